"""Any number of models on lm-eval's tasks, side by side; what a killed run had asked is not asked again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.analysis.run import work_directory
from quantkit.errors import QuantkitError
from quantkit.evaluation.candidates import open_candidate, shown_names
from quantkit.evaluation.lm_eval.results import EvalReport, ModelScores, TaskScores
from quantkit.evaluation.lm_eval.samples import TEMPERATURE, Draws, ask_often
from quantkit.evaluation.lm_eval.scores import all_scores
from quantkit.evaluation.lm_eval.tasks import DEFAULT, SEED, load_tasks, quietly
from quantkit.evaluation.runners import ran_on
from quantkit.kernels.devices import require_device
from quantkit.progress import Progress
from quantkit.versions import package_versions

CACHE = "eval"  # folder in the work directory
RESAMPLES = 1000  # bootstrap for the few metrics whose error has no formula


@dataclass(frozen=True)
class Served:
    """A model behind an endpoint that speaks OpenAI's completions. url: with or without /v1/completions."""

    url: str
    model: str

    @classmethod
    def parse(cls, text: str) -> Served:
        """``URL=MODEL``. Raises QuantkitError for anything else."""
        url, sign, model = text.rpartition("=")
        if not sign or not model or not url.startswith(("http://", "https://")):
            raise QuantkitError(f"{text!r} is not URL=MODEL", hint="such as --served http://localhost:8000=my-model")
        return cls(url, model)

    @property
    def completions(self) -> str:
        """The address that answers."""
        url = self.url.rstrip("/")
        return url if url.endswith("/completions") else f"{url.removesuffix('/v1')}/v1/completions"


@dataclass(frozen=True)
class Options:
    """tasks: names. shots: examples before a question. limit: documents of each task, windows of a text. chat: questions in
    the models' chat templates. data: folder of the offline tasks. work: the work directory. fresh: ask everything again.

    samples: answers to each question, drawn at this temperature (0.7 by default) with this seed where they can be checked; 1: the
    likeliest answer only.

    runtime, device, window, batch: see ``QuantkitLM``; of a served model, batch requests are sent at a time.
    """

    tasks: Sequence[str] = DEFAULT
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    data: Path | str | None = None
    work: Path | None = None
    fresh: bool = False
    runtime: str = "torch"
    device: str = "cpu"
    window: int | None = None
    batch: int = 16
    samples: int = 1
    temperature: float | None = None
    seed: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def draws(self) -> Draws | None:
        """How answers are drawn; None for the likeliest. Raises QuantkitError if that cannot be."""
        temperature = TEMPERATURE if self.temperature is None else self.temperature
        if self.samples < 1 or not 0 < temperature < math.inf or self.seed < 0:
            raise QuantkitError(
                f"cannot draw {self.samples} answers at temperature {temperature:g} with seed {self.seed}",
                hint="--samples is at least 1, --temperature above 0, --seed at least 0",
            )
        if self.samples > 1:
            return Draws(self.samples, temperature, self.seed)
        if self.temperature is not None:
            raise QuantkitError("one answer to a question is the likeliest, at no temperature", hint="add --samples 8, or so")
        return None


def evaluate_models(models: Sequence[Path], options: Options, served: Sequence[Served] = ()) -> EvalReport:
    """Ask all models, the first being the reference; served ones get its tokens.

    Raises MissingDependencyError without lm-eval, QuantkitError for unknown tasks, for models that cannot be opened, for
    endpoints that do not answer, and for answers that cannot be drawn.
    """
    if not models:
        raise QuantkitError("no model", hint="name at least one; served models take its tokenizer")
    draws = _drawable(options, served)
    loaded = load_tasks(options.tasks, options.data, options.shots, options.limit)
    if draws is not None:
        ask_often(loaded["tasks"], draws)
    require_device(options.device)
    for path in models:
        open_candidate(path)  # a mistake in the last one should not cost the time of the others
    found, longest, names = [], None, shown_names(models)
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder, quietly():
        for number, path in enumerate(models):
            with _local(path, options) as lm:
                longest = longest if number else lm.new_tokens
                lm.new_tokens = longest  # generation as long for every model
                found.append(replace(_model(lm, loaded, options), name=names[number]))
                if number == 0:
                    window, adds_bos = lm.max_length, _adds_bos(lm.tokenizer)
                    lm.tokenizer.save_pretrained(folder)
        for endpoint in served:
            found.append(_endpoint(endpoint, _remote(endpoint, folder, window, adds_bos, options), loaded, options))
    return EvalReport(
        tuple(dict.fromkeys(loaded["asked"])), tuple(found), options.limit, options.chat,
        package_versions("lm-eval", "torch", "transformers", *(("llama-cpp-python",) if options.runtime == "llama" else ())),
        options.samples, None if draws is None else draws.temperature, options.seed,
    )  # fmt: skip


def _drawable(options: Options, served: Sequence[Served]) -> Draws | None:
    draws = options.draws
    if draws is not None and served:
        raise QuantkitError(
            "lm-eval's client sends every request to a served model with the same seed", hint="leave out --served, or --samples"
        )
    return draws


@contextlib.contextmanager
def _local(path: Path, options: Options) -> Iterator[Any]:
    from quantkit.evaluation.lm_eval.plugin_model import QuantkitLM

    lm = QuantkitLM(
        str(path), runtime=options.runtime, device=options.device, window=options.window, batch_size=options.batch,
        progress=options.progress,
    )  # fmt: skip
    try:
        if options.chat and lm.tokenizer.chat_template is None:
            raise QuantkitError(f"{path.name} has no chat template", hint="leave out --chat")
        yield lm
    finally:
        lm.close()


def _model(lm: Any, loaded: dict[str, Any], options: Options) -> ModelScores:
    checkpoint, started = lm.checkpoint, time.perf_counter()
    facts = [checkpoint.identity, checkpoint.stamp, lm.runtime, str(lm.device), lm.max_length, lm.new_tokens]
    results = _ask(lm, loaded, options, _cache(checkpoint.path, facts, options))
    return ModelScores(
        checkpoint.path.name, str(checkpoint.path), ran_on(lm.runtime, options.device),
        checkpoint.identity, sum(file.stat().st_size for file in checkpoint.weight_files), lm.max_length, lm.truncated,
        time.perf_counter() - started, results,
    )  # fmt: skip


def _remote(endpoint: Served, tokenizer: str, window: int, adds_bos: bool, options: Options) -> Any:
    """lm-eval's own client for completions."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    try:
        return LocalCompletionsAPI(
            base_url=endpoint.completions, model=endpoint.model, tokenizer=tokenizer, tokenizer_backend="huggingface",
            add_bos_token=adds_bos, max_length=window, num_concurrent=options.batch,
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise QuantkitError(f"served models need more packages ({error.msg[:80]})", hint='pip install "lm-eval[api]"') from None


def _endpoint(endpoint: Served, lm: Any, loaded: dict[str, Any], options: Options) -> ModelScores:
    from quantkit.evaluation.lm_eval.plugin_model import WindowsTask

    started = time.perf_counter()
    tasks = {name: task for name, task in loaded["tasks"].items() if not isinstance(task, WindowsTask)}
    cache = _cache(Path(endpoint.model.replace("/", "-")), [endpoint.completions, endpoint.model, lm.max_length], options)
    try:
        results = _ask(lm, {"tasks": tasks, "groups": loaded["groups"]}, options, cache)
    except QuantkitError:
        raise
    except Exception as error:  # whatever the endpoint, the network or a strange answer causes in lm-eval's client
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        error.__traceback__ = error.__context__ = None
        gc.collect()  # the other requests that failed: asyncio would print them when they go
        raise QuantkitError(
            f"{endpoint.url} does not answer as needed ({line})",
            hint="multiple choice and perplexity need log-probabilities of the prompt (echo with logprobs), as vLLM gives them",
        ) from None
    return ModelScores(
        endpoint.model, endpoint.url, "served", endpoint.model, None, lm.max_length, None, time.perf_counter() - started, results
    )


def _ask(lm: Any, loaded: dict[str, Any], options: Options, cache: Path) -> dict[str, TaskScores]:
    """All tasks of one model."""
    from lm_eval import evaluate
    from lm_eval.api.model import CachingLM

    if not loaded["tasks"]:
        return {}
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    cached: Any = CachingLM(lm, str(cache))
    try:
        results: Any = evaluate(
            cached, loaded, limit=options.limit, bootstrap_iters=RESAMPLES, apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
        )  # fmt: skip
    finally:
        cached.dbdict.close()
    return all_scores(results, loaded["tasks"], options.draws)


def _cache(path: Path, facts: list[Any], options: Options) -> Path:
    """The database of what a model was asked before. facts: all that its answers depend on."""
    versions = package_versions("lm-eval", "torch", "transformers", "llama-cpp-python")
    key = hashlib.sha256(json.dumps([facts, versions]).encode()).hexdigest()[:16]
    cache = work_directory(path, options.work) / CACHE / f"{key}.db"
    cache.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        cache.unlink(missing_ok=True)
    return cache


def _adds_bos(tokenizer: Any) -> bool:
    """Whether a text gets the beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
