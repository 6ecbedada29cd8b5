"""What all trainers share: checkpoints that are complete or not there, and a log on disk. Imported only inside functions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from quantkit.errors import AdapterError
from quantkit.rl.folder import COMPLETE, LOG, SAMPLES, RunFolder
from quantkit.rl.live import Live


class Saves:
    """Checkpoints that are complete or not there: a full disk costs the newest one only."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            (folder / COMPLETE).touch()
        except (OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            kept = sorted(
                (path.name for path in folder.parent.glob("checkpoint-*")), key=lambda name: int(name.rpartition("-")[2])
            )
            raise AdapterError(
                f"{folder.name} could not be written ({error})",
                hint=f"make room and --resume; {f'{kept[-1]} is' if kept else 'no checkpoint is'} there to go on from",
            ) from None


class _Watch(TrainerCallback):
    """Writes the log while the training runs, and shows it in a terminal."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._live: Live | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        self._live = Live(state.max_steps, begun=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        self._folder.write_lines(LOG, state.log_history)
        if self._live is not None:
            self._live.show(state.log_history, next(iter(self._folder.lines(SAMPLES)[-1:]), None))

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.close()


@contextlib.contextmanager
def watched(trainer: Any, folder: RunFolder) -> Iterator[None]:
    """While training: the trainer's log goes into the folder and, as curves, into the terminal; nothing else is printed."""
    trainer.remove_callback(PrinterCallback)
    callback = _Watch(folder)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        callback.close()
