"""What was measured of the files of a model card: rows of a board or of a report, and which file is best for its size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.documents import typed
from quantkit.checkpoint.files import read_json
from quantkit.errors import CheckpointError, PlanError
from quantkit.evaluation.board import Row, read_board
from quantkit.evaluation.card.artifact import Artifact
from quantkit.metrics import Divergence


@dataclass(frozen=True)
class Measurement:
    """One row of a board or a report about an artifact.

    made: when and by what, if it is known. setting: what measurements must share to be compared.
    """

    reference: str
    texts: tuple[str, ...]
    window: int
    runtime: str
    divergence: Divergence
    made: str
    setting: Hashable


def measurements(artifacts: Sequence[Artifact], board: Path | None, report: Path | None) -> list[list[Measurement]]:
    """Of these very files, for each artifact. Raises CheckpointError if the board or report is none, PlanError for both."""
    if board is not None and report is not None:
        raise PlanError("--board and --report exclude each other", hint="give one of them")
    if board is not None:
        ranked = [row for rows in read_board(board).groups() for row in rows]
        return [[_from_row(row) for row in ranked if _is_of(row, artifact)] for artifact in artifacts]
    return _from_report(report, artifacts) if report is not None else [[] for _ in artifacts]


def _is_of(row: Row, artifact: Artifact) -> bool:
    if row.file_bytes != artifact.file_bytes:
        return False
    if row.sha256 is not None and artifact.sha256 is not None:
        return row.sha256 == artifact.sha256
    return artifact.checkpoint is not None and row.identity == artifact.checkpoint.identity


def _from_row(row: Row) -> Measurement:
    device = row.hardware.gpu or row.hardware.machine
    commit = f" (commit {row.commit})" if row.commit else ""
    made = f"{row.reference}, {row.runtime}: {row.date[:10]} on {device}; {pairs(row.versions)}{commit}"
    runtime = f"{row.runtime} on {row.device}"
    return Measurement(row.reference, row.texts, row.window, runtime, row.divergence, made, row.setting)


def _from_report(path: Path, artifacts: Sequence[Artifact]) -> list[list[Measurement]]:
    """A report knows candidates by name and size, and by their hashes if they have manifests."""
    report = read_json(path)
    try:
        if report.get("quantkit_report") != 1:
            raise ValueError("another kind or version")
        reference, runtime = (typed(str, report[key], key) for key in ("reference", "runtime"))
        texts, window = typed(tuple[str, ...], report["texts"], "texts"), typed(int, report["window"], "window")
        versions = pairs(typed(dict[str, str], report["versions"], "versions"))
        found: list[list[Measurement]] = [[] for _ in artifacts]
        for entry in typed(list[dict[str, Any]], report["candidates"], "candidates"):
            divergence = typed(Divergence, entry["divergence"], entry["name"])
            for artifact, own in zip(artifacts, found, strict=True):
                if _is_candidate(entry, artifact):
                    own.append(Measurement(reference, texts, window, runtime, divergence, versions, path))
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a report of `quantkit compare --json` ({error})", hint="make it again, or use --board"
        ) from None


def _is_candidate(entry: dict[str, Any], artifact: Artifact) -> bool:
    if (entry["name"], entry["file_bytes"]) != (artifact.path.resolve().name, artifact.file_bytes):
        return False
    return None in (known := (entry.get("sha256"), artifact.sha256)) or known[0] == known[1]


def common_setting(found: Iterable[Sequence[Measurement]]) -> Hashable:
    """The setting in which most artifacts were measured, of several the first; None if nothing was measured."""
    counts = Counter(setting for own in found for setting in dict.fromkeys(m.setting for m in own))
    return counts.most_common(1)[0][0] if counts else None


def best_for_size(sizes: Sequence[tuple[int, float]]) -> list[int]:
    """Places in ``sizes`` (bytes, mean KLD) that no other of at most the same bytes beats, as in ``board``; smallest first."""
    out: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if not math.isnan(kld := sizes[place][1]) and (not out or kld < sizes[out[-1]][1]):
            out.append(place)
    return out


def pairs(values: dict[str, Any]) -> str:
    """A mapping in words."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
