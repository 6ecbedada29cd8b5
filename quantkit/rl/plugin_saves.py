"""What all trainers share: checkpoints that are complete or not there, and a log on disk. Imported only inside functions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from quantkit.errors import AdapterError
from quantkit.rl.folder import COMPLETE, LOG, RunFolder


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
    """Writes the log while the training runs."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_log(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        self._folder.write_lines(LOG, state.log_history)


def watch(trainer: Any, folder: RunFolder) -> None:
    """Let a trainer write its log into the folder, and print nothing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(folder))
