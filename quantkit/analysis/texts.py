"""Calibration text: the mix inside the package or the user's files, cut into windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.modeling.text import TextEncoder

DATA = Path(__file__).parent / "data"
DEFAULT_MIX = ("web.txt", "wiki.txt", "code.txt", "dialogue.txt", "chat.jsonl")
WINDOW = 512
SHORTEST = 32  # tokens of text below which there is nothing to calibrate on
DEV_EVERY = 4  # every fourth window is set aside: probes judge on it, statistics never see it


def _no_windows() -> npt.NDArray[np.int64]:
    return np.zeros((0, 0), np.int64)


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids: ``train`` feeds the statistics, ``dev`` judges probes. int64 (n, window).

    further: gives windows that are in neither, for experts that ``train`` does not reach; read only when called.
    """

    train: npt.NDArray[np.int64]
    dev: npt.NDArray[np.int64]
    names: tuple[str, ...]
    further: Callable[[], npt.NDArray[np.int64]] = field(default=_no_windows, compare=False)

    @property
    def window(self) -> int:
        """Tokens in one window."""
        return self.train.shape[1]


def read_text(path: Path, encoder: TextEncoder) -> str:
    """The text of one file; a .jsonl of ``messages`` goes through the model's chat template.

    Raises CalibrationError if the file is missing, not UTF-8 or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})", hint="give a plain text file") from None
    if path.suffix == ".jsonl":
        text = "\n".join(_jsonl(path, text, encoder))
    if not text.strip():
        raise CalibrationError(f"{path} holds no text", hint="give a file with text")
    return text


def _jsonl(path: Path, text: str, encoder: TextEncoder) -> list[str]:
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            out.append(encoder.render_chat(row["messages"]) if "messages" in row else str(row["text"]))
        except (ValueError, KeyError, TypeError):
            raise CalibrationError(
                f"{path}:{number} has neither messages nor text", hint='one JSON object a line: {"messages": […]} or {"text": …}'
            ) from None
    return out


def token_windows(texts: list[str], encoder: TextEncoder, window: int, limit: int) -> npt.NDArray[np.int64]:
    """At most ``limit`` tokens as windows, an equal share of each text, spread over its length.

    Every window starts with the beginning-of-text token if the model wants one.
    """
    share = max(1, limit // window // len(texts))
    rows = []
    for text in texts:
        found = encoder.windows(text, window)
        count = len(found)
        rows += [found[i] for i in np.unique(np.linspace(0, count - 1, min(share, count)).astype(int))]
    if not rows and len(texts) == 1:  # one short text: a single shorter window
        length = len(encoder.encode(texts[0]))
        if length >= SHORTEST:
            rows = encoder.windows(texts[0], length + (encoder.bos is not None))
    if not rows:
        raise CalibrationError(f"the calibration text has fewer than {window} tokens", hint="give more text with --calibration")
    return np.array(rows, dtype=np.int64)


def further_windows(paths: list[Path], encoder: TextEncoder, used: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """At most ``limit`` tokens of whole windows that are not in ``used``: of ``paths`` in turn, spread over each file."""
    window = used.shape[1]
    known = {row.tobytes() for row in used}
    out: list[npt.NDArray[np.int64]] = []
    for path in paths:
        found = np.array(encoder.windows(read_text(path, encoder), window), dtype=np.int64).reshape(-1, window)
        fresh = [row for row in found if row.tobytes() not in known]
        known |= {row.tobytes() for row in fresh}
        count = min(len(fresh), limit // window - len(out))
        out += [fresh[i] for i in np.unique(np.linspace(0, len(fresh) - 1, count).astype(int))]
    return np.array(out, dtype=np.int64).reshape(-1, window)


def load_calibration(checkpoint: Checkpoint, files: list[Path] | None, tokens: int) -> CalibrationText:
    """Calibration windows from ``files`` or the default mix, about ``tokens`` tokens in all.

    Raises CalibrationError if there is too little text for both parts.
    """
    encoder = TextEncoder(checkpoint)
    paths = files or [DATA / name for name in DEFAULT_MIX]
    texts = [read_text(path, encoder) for path in paths]
    window = min(WINDOW, int(checkpoint.config.get("max_position_embeddings") or WINDOW))
    windows = token_windows(texts, encoder, window, tokens)
    own = paths
    if len(windows) < 2:
        halves = windows.shape[1] // 2
        windows = windows[:, : 2 * halves].reshape(2, halves)
        own = []  # all of it is in use
    held = np.arange(len(windows)) % DEV_EVERY == DEV_EVERY - 1
    if not held.any():
        held[-1] = True
    train = windows[~held]

    def further() -> npt.NDArray[np.int64]:
        defaults = [DATA / name for name in DEFAULT_MIX]
        return further_windows([*own, *(p for p in defaults if p not in own)], encoder, windows, train.size)

    return CalibrationText(train, windows[held], tuple(path.name for path in paths), further)
