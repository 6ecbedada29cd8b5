"""Parts of the HTML report that are tables: headline, breakdown, worst tokens, samples of text side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.evaluation.breakdown import Group, WorstToken
from quantkit.evaluation.compare import Candidate, Report
from quantkit.evaluation.continued import Continued

AXES = (
    ("text", "By text", "text"),
    ("position", "By position in the window", "position"),
    ("frequency", "By how frequent the next token is", "rank among the text's tokens"),
    ("certainty", "By how sure the original was", "probability of its best token"),
    ("entropy", "By the entropy of the original", "nats"),
)
PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "␡", 10: "⏎", 9: "⇥"}
UNFIT = dict.fromkeys(range(55296, 57344), "�")  # lone surrogates, which no file can hold


@dataclass(frozen=True)
class Sample:
    """One prompt continued by several models: name → text. The first is the original."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Value:
    """A number as it is shown, and as the JSON document has it (for sorting and for machines)."""

    shown: str
    exact: str
    error: str = ""


def samples_of(texts: Sequence[Continued]) -> list[Sample]:
    """What models said after prompts, by prompt."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        found.setdefault(text.prompt, {})[text.model] = text.text
    return [Sample(prompt, by_model) for prompt, by_model in found.items()]


def visible(words: str) -> str:
    """Text with control characters as signs that can be seen."""
    return words.translate(PICTURES | UNFIT)


def printable(words: str) -> str:
    """Text whose lines stay lines; other control characters as signs."""
    kept = {code: sign for code, sign in (PICTURES | UNFIT).items() if code not in (9, 10)}
    return words.translate(kept)


def _value(number: float | None, form: str, error: float | None = None, scale: float = 1, end: str = "") -> Value:
    if number is None:
        return Value("–", "null")
    return Value(
        format(scale * number, form) + end, json.dumps(number), "" if error is None else format(scale * error, form) + end
    )


def places(error: float) -> int:
    """Decimals that show two digits of a standard error, at least five."""
    return 5 if not 0 < error < 1e-3 else min(12, 1 - math.floor(math.log10(error)))


def _speed(number: float) -> Value:
    """Tokens per second, without an exponent."""
    return Value(f"{number:,.0f}" if number >= 1000 else f"{number:.4g}", json.dumps(number))


HEADLINE = (
    ("mean_kld", "mean KLD"), ("file_bytes", "bytes"), ("bpw", "bits per weight"), ("p999_kld", "99.9 % KLD"),
    ("perplexity_ratio", "perplexity ratio"), ("top1_agreement", "top-1 agreement"), ("predicted_kld", "predicted KLD"),
)  # fmt: skip


def headline(candidate: Candidate) -> list[Value]:
    """The numbers of one row, in the order of HEADLINE."""
    d = candidate.divergence
    return [
        _value(d.mean_kld, f".{places(d.mean_kld_error)}f", d.mean_kld_error),
        _value(candidate.file_bytes, ",d"),
        _value(candidate.bpw, ".3f"),
        _value(d.p999_kld, ".4f"),
        _value(d.perplexity_ratio, ".4f", d.perplexity_ratio_error),
        _value(d.top1_agreement, ".2f", d.top1_error, 100, " %"),
        _value(candidate.predicted_kld, ".5f"),
    ]


FOOTPRINT = (
    ("load_seconds", "loads in, s"), ("prompt_speed", "prompt, tokens/s"), ("speed", "then, tokens/s"),
    ("memory_bytes", "peak memory, MiB"), ("model_bytes", "of it the model's, MiB"),
)  # fmt: skip


def footprint_rows(report: Report) -> list[tuple[str, list[Value]]]:
    """What running each model takes, in the order of FOOTPRINT, the original first; empty if it was not measured."""
    known = [(report.reference, report.reference_footprint), *((c.name, c.footprint) for c in report.candidates)]
    return [
        (name, [
            _value(f.load_seconds, ".3g"), _speed(f.prompt_speed), _speed(f.speed),
            _value(f.memory_bytes, ",.1f", scale=2**-20), _value(f.model_bytes, ",.1f", scale=2**-20),
        ])
        for name, f in known if f is not None
    ]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """Divergence of one candidate in one group. part: of its largest over the groups, per cent."""

    group: Group
    part: float


def breakdown_tables(report: Report) -> list[dict[str, Any]]:
    """For each way to part the tokens: rows of (name, tokens, a bar for each candidate that has a breakdown)."""
    known = [c.breakdown for c in report.candidates if c.breakdown is not None]
    out = []
    for axis, title, what in AXES:
        by_name = [{group.name: group for group in getattr(b, axis)} for b in known]
        names = list(dict.fromkeys(name for groups in by_name for name in groups))
        if len(names) < 2 or not by_name:
            continue
        most = [max((g.mean_kld for g in groups.values()), default=0) or 1 for groups in by_name]
        rows = []
        for name in names:
            bars = [
                Bar(g[name], 100 * g[name].mean_kld / top) if name in g else None for g, top in zip(by_name, most, strict=True)
            ]
            rows.append((name, next(g[name].tokens for g in by_name if name in g), bars))
        out.append({"axis": axis, "title": title, "what": what, "rows": rows})
    return out


def worst_tokens(candidate: Candidate) -> list[WorstToken]:
    """Where a candidate departed most from the original, worst first."""
    return candidate.breakdown.worst if candidate.breakdown is not None else []


def side_by_side(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples with each text parted where it first departs from the original's: same, first word that differs, rest."""
    out = []
    for sample in samples:
        names = list(sample.texts)
        original = sample.texts[names[0]] if names else ""
        rows = [{"name": name, **_parted(original, sample.texts[name])} for name in names[1:]]
        out.append({"prompt": sample.prompt, "name": names[0] if names else "", "original": original, "rows": rows})
    return out


def _parted(original: str, other: str) -> dict[str, Any]:
    """``at``: characters that both share, None if they are equal."""
    if original == other:
        return {"same": other, "first": "", "rest": "", "at": None}
    shared = next((i for i, (a, b) in enumerate(zip(original, other, strict=False)) if a != b), min(len(original), len(other)))
    start = 1 + max((other.rfind(space, 0, shared) for space in " \n\t"), default=-1)
    end = min((i for space in " \n\t" if (i := other.find(space, shared + 1)) >= 0), default=len(other))
    return {"same": other[:start], "first": other[start:end] or "∎", "rest": other[end:], "at": shared}


def lead(report: Report) -> str:
    """One sentence: who stays closest, at which share of the bytes."""
    if not report.candidates:
        return "Nothing was compared."
    others = [c for c in report.candidates if c.identity != report.reference_identity or not c.identity] or report.candidates
    best = min(others, key=lambda c: (math.isnan(c.divergence.mean_kld), c.divergence.mean_kld))
    d = best.divergence
    share = f" in {100 * best.file_bytes / report.reference_bytes:.0f} % of its bytes" if report.reference_bytes else ""
    among = f"Of {len(others)} candidates {best.name} stays" if len(others) > 1 else f"{best.name} stays"
    return (
        f"{among} closest to the original{share}: {d.mean_kld:.5f} nats per token of KL divergence on average, "
        f"the same first choice at {100 * d.top1_agreement:.1f} % of the tokens."
    )
