"""Mistakes in what a user asks for, found before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.checkpoint import require_readable
from quantkit.checkpoint.files import require_folder
from quantkit.errors import CalibrationError, CheckpointError, OutputError, PlanError
from quantkit.evaluation.board import require_board
from quantkit.evaluation.candidates import open_candidate
from quantkit.evaluation.compare import is_kept
from quantkit.kernels.devices import require_device


def require_runtime(runtime: str, device: str, compiled: bool = False) -> None:
    """Raise PlanError for what llama.cpp does not do here, FormatError for a device that is not there."""
    if runtime == "llama" and (device != "cpu" or compiled):
        what = f"on {device}" if device != "cpu" else "compiled"
        raise PlanError(
            f"--runtime llama does not run {what} here", hint="leave out --device and --compile, or use --runtime torch"
        )
    require_device(device)


def check_comparison(
    reference: str | Path, candidates: Sequence[str | Path], text: Sequence[str | Path] = (), runtime: str = "torch",
    device: str = "cpu", limit: int | None = None, html: str | Path | None = None, cache: str | Path | None = None,
    append: str | Path | None = None, more: bool = False,
) -> None:  # fmt: skip
    """Find mistakes in the arguments of ``api.compare`` before anything is run. more: whether tasks or texts are
    to be run before it, for which the original has to be a model. Raises a QuantkitError.
    """
    require_runtime(runtime, device)
    if html is not None:
        require_folder(Path(html))
        if Path(html).suffix.lower() not in (".html", ".htm"):
            raise OutputError(f"{html} is not a name for a report", hint="end it in .html")
    if is_kept(Path(reference)):
        if text or limit or cache:
            hint = "leave out --text, --limit and --cache, or give the model itself"
            raise CheckpointError(f"{reference} is what was kept of a model on its text; it knows no other text", hint=hint)
        if more:
            hint = "leave out --tasks and --prompt, or give the model itself"
            raise CheckpointError(f"{reference} is what was kept of a model; it cannot answer or write", hint=hint)
    elif text:
        for path in text:
            if not Path(path).exists():
                raise CalibrationError(
                    f"{path} does not exist", hint="give a text, .jsonl or .parquet file, or a folder of texts"
                )
    if append is not None:
        require_board(Path(append))
    if more:  # else comparing opens them next
        for path in candidates:
            require_readable(open_candidate(Path(path)))
