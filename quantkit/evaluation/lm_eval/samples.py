"""Several answers to each question, drawn at random: pass@k and majority@k of tasks whose answers can be checked.

lm-eval's own ``repeats`` asks for them, its filters find the answers in the texts, and its metric judges each by itself.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evaluation.lm_eval.results import Item, Score, TaskScores
from quantkit.evaluation.statistics import standard_error
from quantkit.passk import majority_at_k, pass_at_k

VERDICTS = ("exact_match", "acc", "em")  # metrics that call one generated answer right or wrong
CHOOSING = ("take_first", "take_first_k", "majority_vote")  # filters that choose among the answers to a question
INVALID = "[invalid]"  # what lm-eval's filters say where a text has no answer
TEMPERATURE = (
    0.7  # as for self-consistency (arXiv 2203.11171); for pass@k between the best of k = 1 and of k = 100 (arXiv 2107.03374)
)


@dataclass(frozen=True)
class Draws:
    """How many answers to each question, from softmax(logits ÷ temperature) of all tokens. seed: of the random numbers."""

    samples: int
    temperature: float = TEMPERATURE
    seed: int = 0

    @property
    def ks(self) -> list[int]:
        """Powers of two up to the number of answers."""
        return [1 << power for power in range(self.samples.bit_length())]


def verdict_of(task: Any) -> str | None:
    """The metric that tells whether a generated answer is right; None for tasks whose answers cannot be checked so."""
    if getattr(task, "OUTPUT_TYPE", None) != "generate_until":
        return None
    known = task.higher_is_better()
    return next((metric for metric in VERDICTS if metric in known), None)


def ask_often(tasks: Mapping[str, Any], draws: Draws) -> list[str]:
    """Let lm-eval ask each question of the tasks that can be checked several times; their names.

    What else a task says about drawing (top_k, beams …) is left out, and so are filters that choose among answers, and
    those that only differ in how they choose. Raises QuantkitError if there is no such task.
    """
    names = [name for name, task in tasks.items() if verdict_of(task) is not None]
    if not names:
        raise QuantkitError(
            f"no answer of {', '.join(tasks) or 'these tasks'} can be drawn and checked",
            hint="leave out --samples, or add a task that generates an exact answer, such as gsm8k_local",
        )
    for name in names:
        task = tasks[name]
        known = task.get_config("generation_kwargs") or {}
        kept = {key: value for key, value in known.items() if key == "until" or key.startswith("max_")}
        random = {"do_sample": True, "temperature": draws.temperature, "seed": draws.seed}
        task.set_config(key="repeats", value=draws.samples)
        task.set_config(key="generation_kwargs", value=kept | random)
        task._filters = list(_finding(task._filters))
    return names


def _finding(filters: Sequence[Any]) -> Iterator[Any]:
    """Filters that find an answer in each text; then lm-eval takes the first. Of equal ones only the first."""
    from lm_eval.api.filter import FilterEnsemble
    from lm_eval.api.registry import get_filter

    seen = []
    for ensemble in filters:
        steps = _steps(ensemble)
        if (facts := [(step.func, step.keywords) for step in steps]) not in seen:
            seen.append(facts)
            yield FilterEnsemble(ensemble.name, [*steps, get_filter("take_first")])


def _steps(ensemble: Any) -> list[Any]:
    from lm_eval.api.registry import get_filter

    choosing = [get_filter(name) for name in CHOOSING]
    return [step for step in ensemble.filters if getattr(step, "func", step) not in choosing]


@dataclass(frozen=True)
class Judged:
    """The answers to one question by one filter: shares by metric, and how many are right by the name of lm-eval's metric."""

    scores: dict[str, float]
    right: dict[str, int]


def judge(task: Any, sample: dict[str, Any], suffix: str, draws: Draws) -> Judged:
    """Every answer of one of lm-eval's samples by its filter and the task's own metric. suffix: of the metrics' names."""
    ensemble = next(one for one in task._filters if one.name == sample["filter"])
    found: Any = [sample["resps"][0]]
    steps = _steps(ensemble)
    for step in steps:
        found = list(step().apply(found, [sample["doc"]]))
    metric, answers = verdict_of(task), list(found[0])
    right = [float(task.process_results(sample["doc"], [answer])[metric]) == 1.0 for answer in answers]
    scores = {f"pass@{k}{suffix}": pass_at_k(len(right), sum(right), k) for k in draws.ks}
    if steps and len(answers) > 1:  # whole texts are hardly ever the same
        spoken = [_spoken(answer, task, metric) for answer in answers]
        scores[f"majority@{len(answers)}{suffix}"] = majority_at_k(spoken, right, len(answers))
    return Judged(scores, {f"{metric}{suffix}": sum(right)})


def _spoken(answer: Any, task: Any, metric: str | None) -> str | None:
    """An answer as lm-eval's exact match compares it: 1,000 and 1000 may be the same. None if there is none."""
    text, options = str(answer), getattr(task, "_metric_fn_kwargs", {}).get(metric) or {}
    if text in (INVALID, ""):
        return None
    for pattern in options.get("regexes_to_ignore") or ():
        text = re.sub(pattern, "", text)
    text = text.lower() if options.get("ignore_case") else text
    gone = string.punctuation * bool(options.get("ignore_punctuation")) + string.digits * bool(options.get("ignore_numbers"))
    return text.translate(str.maketrans("", "", gone))


def mean_scores(items: Sequence[Item]) -> tuple[Score, ...]:
    """Means over questions of the shares that several answers were scored by, with their standard errors."""
    out = []
    for name in dict.fromkeys(name for item in items for name in item.scores):
        values = [value for item in items if isinstance(value := item.scores.get(name), float)]
        out.append(Score(name, sum(values) / len(values), standard_error(values), "share", True))
    return tuple(out)


def with_groups(results: dict[str, TaskScores], names: Sequence[str]) -> dict[str, TaskScores]:
    """Results whose groups have the means over all questions of those of their tasks that were asked several times.

    lm-eval's own mean would be that of first answers.
    """
    out = dict(results)
    for name, group in results.items():
        leaves = [leaf for leaf in _leaves(results, name) if leaf in names]
        if group.members and leaves:
            dropped = {metric for leaf in leaves for item in results[leaf].items for metric in item.right}
            pooled = mean_scores([item for leaf in leaves for item in results[leaf].items])
            out[name] = replace(group, scores=(*(s for s in group.scores if s.name not in dropped), *pooled))
    return out


def _leaves(results: Mapping[str, TaskScores], name: str) -> list[str]:
    """Tasks of a group and of the groups in it; a task alone is its own."""
    found = results.get(name)
    if found is None or not found.members:
        return [name]
    return [leaf for member in found.members for leaf in _leaves(results, member)]
