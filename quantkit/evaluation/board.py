"""The leaderboard: rows of comparisons kept across runs in one file, board.json.

Numbers are ranked together only if the original, the text as tokens, the runtime and the device are the same; other rows
stand in tables of their own.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.checkpoint.documents import strict_json, typed
from quantkit.checkpoint.files import require_folder, write_text
from quantkit.errors import CheckpointError, OutputError
from quantkit.evaluation.compare import Report
from quantkit.evaluation.runners import runtime_and_device
from quantkit.metrics import Divergence
from quantkit.planning.rates import machine_name
from quantkit.versions import package_versions

KIND, VERSION = "quantkit_board", 1
LOCK_SECONDS = 60.0  # that a writer waits for another one
COLUMNS = (
    "candidate", "bytes", "bpw", "mean KLD", "median", "99 %", "99.9 %", "perplexity ratio", "top-1 agreement", "best for its size",
)  # fmt: skip
ORIGIN = ("date", "quantkit", "machine")


@dataclass(frozen=True)
class Hardware:
    """machine: processor and cores; gpu: the GPU that the models ran on, if they did."""

    machine: str
    gpu: str | None


@dataclass(frozen=True)
class Row:
    """One candidate of one comparison. KLD in nats per token; estimate_error as in ``Candidate``.

    identity, reference_identity: as files carry them (docs/files.md). sha256: of the file, of a folder or of a split
    file that of its list of hashes; None without a manifest. text_identity: SHA-256 of the windows of token ids.
    """

    reference: str
    reference_identity: str
    reference_bytes: int
    architecture: str
    texts: tuple[str, ...]
    text_identity: str
    window: int
    tokens: int
    runtime: str
    device: str
    name: str
    identity: str
    sha256: str | None
    file_bytes: int
    bpw: float
    divergence: Divergence
    estimate_error: float
    predicted_kld: float | None
    versions: dict[str, str]
    commit: str | None
    hardware: Hardware
    date: str

    @property
    def setting(self) -> tuple[str, str, str, str, int, int]:
        """What rows must share to be ranked together."""
        return self.reference_identity, self.text_identity, self.runtime, self.device, self.window, self.tokens

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with the same key are about the same file in the same setting: the newer replaces the older."""
        return (*self.setting, self.identity, self.file_bytes, self.sha256)

    @property
    def rank(self) -> tuple[bool, float, int, str]:
        """Order within a setting: least divergence first, what is no number last."""
        kld = self.divergence.mean_kld
        return math.isnan(kld), 0.0 if math.isnan(kld) else kld, self.file_bytes, self.name


@dataclass(frozen=True)
class Board:
    """All rows, in the order in which they came."""

    rows: tuple[Row, ...] = ()

    def added(self, rows: Sequence[Row]) -> Board:
        """With more rows; one with the key of another takes its place."""
        known = {row.key: row for row in self.rows}
        return Board(tuple((known | {row.key: row for row in rows}).values()))

    def groups(self) -> list[list[Row]]:
        """Rows by setting, each group ranked; groups by name of the original, then of the texts, then by runtime."""
        found: dict[Any, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row.reference, row.texts, row.setting)):
            found.setdefault(row.setting, []).append(row)
        return [sorted(rows, key=lambda row: row.rank) for rows in found.values()]

    def to_json(self) -> str:
        """The document as text; numbers that are not finite are null."""
        return strict_json({KIND: VERSION, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"


def read_board(path: Path) -> Board:
    """Raises CheckpointError if the file cannot be read, is no board, or is one of a newer quantkit."""
    hint = "give another name, or move the file away"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a board of quantkit, or damaged ({error})", hint=hint) from None
    version = data.get(KIND) if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(f"{path} is not a board of quantkit", hint=hint)
    if version != VERSION:
        raise CheckpointError(
            f"{path} is a board of version {version}, this quantkit knows {VERSION}", hint="update quantkit, or give another name"
        )
    try:
        return Board(
            tuple(typed(Row, entry, f"row {i}") for i, entry in enumerate(typed(list[Any], data.get("rows"), "rows"), 1))
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is a damaged board ({error})", hint=hint) from None


def append(path: Path, rows: Sequence[Row]) -> Board:
    """Add rows to the board at ``path``, which is made if it is not there; returns what it holds then.

    Writers wait for each other. Raises CheckpointError if the file is no board, OutputError if it cannot be written;
    it is as it was then.
    """
    path = path.resolve()
    with _locked(path):
        board = (read_board(path) if path.exists() else Board()).added(rows)
        write_text(path, board.to_json())
    return board


def require_board(path: Path) -> None:
    """Raise CheckpointError or OutputError if rows could not be added, before anything is run for them."""
    require_folder(path.resolve())
    if path.exists():
        read_board(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The board is replaced as a whole, so the lock is a file of its own beside it; it stays."""
    from filelock import FileLock, Timeout

    require_folder(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"another program has been writing {path} for {LOCK_SECONDS:g} s", hint="try again") from None
    except OSError as error:
        raise OutputError(f"cannot lock {path}: {error.strerror}", hint="choose another board") from None
    try:
        yield
    finally:
        lock.release()


def rows_of(report: Report) -> list[Row]:
    """Rows of a comparison that was just made on this machine."""
    runtime, device = runtime_and_device(report.runtime)
    hardware = Hardware(machine_name(), _gpu(device))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    versions, commit = {**package_versions(), **report.versions}, _commit()
    return [
        Row(
            report.reference, report.reference_identity, report.reference_bytes, report.architecture, tuple(report.texts),
            report.text_identity, report.window, report.tokens, runtime, device.partition(":")[0], c.name, c.identity,
            c.sha256, c.file_bytes, c.bpw, c.divergence, c.estimate_error, c.predicted_kld, versions, commit, hardware, date,
        )
        for c in report.candidates
    ]  # fmt: skip


def _gpu(device: str) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _commit() -> str | None:
    """The commit of quantkit where it runs out of a checkout, with ``+changes`` if its code was changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    said = []
    for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "quantkit"]):
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+changes" if said[1] else "")


@dataclass(frozen=True)
class Table:
    """One ranking, ready to print: every cell is text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render(board: Board, *, like: Report | None = None, origin: bool = False) -> list[Table]:
    """A table for each setting; with ``like`` only those of that report's original and text.

    origin: also columns that say when, by which quantkit and on which machine a row was made.
    """
    return [
        _table(rows, origin)
        for rows in board.groups()
        if like is None or (rows[0].reference_identity, rows[0].text_identity) == (like.reference_identity, like.text_identity)
    ]


def _table(rows: list[Row], origin: bool) -> Table:
    first, columns = rows[0], (*COLUMNS, *ORIGIN) if origin else COLUMNS
    title = (
        f"against {first.reference} ({first.reference_bytes:,} bytes) on {', '.join(first.texts)}: {first.tokens:,} tokens scored in "
        f"windows of {first.window}, {first.runtime} on {first.device}; KLD in nats per token"
    )
    best = best_for_size(rows)
    return Table(title, columns, tuple(_cells(row, row in best) + (_origin(row) if origin else ()) for row in rows))


def best_for_size(rows: Sequence[Row]) -> list[Row]:
    """Rows of one setting that no other of at most the same size beats in mean KL divergence."""
    out: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.file_bytes, *row.rank)):
        if not math.isnan(row.divergence.mean_kld) and (not out or row.rank[:2] < out[-1].rank[:2]):
            out.append(row)
    return out


def _cells(row: Row, best: bool) -> tuple[str, ...]:
    d = row.divergence
    return (
        row.name, f"{row.file_bytes:,}", f"{row.bpw:.3f}", f"{d.mean_kld:.5f} ± {d.mean_kld_error:.5f}", f"{d.median_kld:.5f}",
        f"{d.p99_kld:.4f}", f"{d.p999_kld:.4f}", f"{d.perplexity_ratio:.4f} ± {d.perplexity_ratio_error:.4f}",
        f"{100 * d.top1_agreement:.2f} %", "yes" if best else "",
    )  # fmt: skip


def _origin(row: Row) -> tuple[str, ...]:
    version = row.versions.get("quantkit-llm", "unknown")
    machine = row.hardware.machine if row.hardware.gpu is None else f"{row.hardware.gpu}; {row.hardware.machine}"
    return row.date[:10], f"{version} ({row.commit})" if row.commit else version, machine


def clean(text: str) -> str:
    """One line that UTF-8 can hold."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).encode("utf-8", "replace").decode().split())


def markdown(text: object) -> str:
    """Text that Markdown and HTML show as it is, in a table too."""
    plain = clean(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)


def to_markdown(table: Table) -> str:
    """The title and a table as GitHub's Markdown."""
    lines = [table.columns, tuple("---" if i == 0 else "--:" for i in range(len(table.columns))), *table.rows]
    cells = ["| " + " | ".join(row if i == 1 else map(markdown, row)) + " |" for i, row in enumerate(lines)]
    return "\n".join([markdown(table.title), "", *cells])
