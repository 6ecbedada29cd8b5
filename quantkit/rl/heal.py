"""Healing: an adapter on the quantized model that reproduces the outputs of the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.errors import AdapterError
from quantkit.modeling.text import TextEncoder
from quantkit.rl.options import HealOptions
from quantkit.rl.train import Outcome, finish, prepare, require_packages

HELD = 10  # every so many-th window is kept to measure on


@dataclass(frozen=True)
class Healed:
    """Mean KL divergence from the original on windows that training did not see, nats/token: of the base, with the adapter as it
    began, and at the end."""

    outcome: Outcome
    base: float
    begun: float
    healed: float


def heal(
    base: Path, teacher: Path, texts: list[Path], out: Path, options: HealOptions | None = None, *, adapter: Path | None = None,
    resume: bool = False, force: bool = False,
) -> Healed:  # fmt: skip
    """Train an adapter on texts so that the base's outputs become the teacher's (KL divergence, every token alike).

    A tenth of the windows is kept to measure on. Raises AdapterError for a teacher of another vocabulary or too little text.
    """
    options = options or HealOptions()
    require_packages()
    original = open_checkpoint(teacher)
    windows = windows_of(original, texts, options.window)
    if len(windows) < 2 * HELD:
        raise AdapterError(
            f"the texts have {len(windows)} windows of {options.window} tokens",
            hint=f"give {2 * HELD} or more, or a smaller --window",
        )
    if open_checkpoint(base).config["vocab_size"] != original.config["vocab_size"]:
        raise AdapterError(f"{teacher} has another vocabulary than {base.name}", hint="give the model that was quantized")
    held, kept = windows[::HELD], np.delete(windows, np.s_[::HELD], axis=0)
    said = {"method": "qat", "teacher": original.identity, "data": _hash(windows)}
    job = prepare(base, out, options, said, adapter=adapter, resume=resume, force=force)
    from datasets import Dataset
    from transformers import TrainingArguments

    from quantkit.modeling.packed import packed_model
    from quantkit.rl.plugin_heal import HealTrainer, begin_with_residual, mean_divergence
    from quantkit.rl.plugin_saves import watch

    job.begin()
    master = packed_model(original, job.base.model.dtype, options.device)
    with job.model.disable_adapter():
        plain = mean_divergence(job.model, master, held)
    if options.residual and adapter is None:
        begin_with_residual(job.model, master)
    begun = mean_divergence(job.model, master, held)
    trainer = HealTrainer(
        model=job.model, args=job.arguments(TrainingArguments, remove_unused_columns=False, dataloader_drop_last=True),
        train_dataset=Dataset.from_dict({"input_ids": kept.tolist()}).with_format("torch"), teacher=master,
    )  # fmt: skip
    watch(trainer, job.folder)
    outcome = finish(job, trainer)
    return Healed(outcome, plain, begun, mean_divergence(job.model, master, held))


def windows_of(checkpoint: Checkpoint, texts: list[Path], window: int) -> npt.NDArray[np.int64]:
    """Whole windows of token ids, (windows, window). Raises AdapterError for a text that cannot be read."""
    encoder = TextEncoder(checkpoint)
    rows: list[list[int]] = []
    for path in texts:
        try:
            rows += encoder.windows(path.read_text(encoding="utf-8"), window)
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"{path} cannot be read ({error})", hint="give text in UTF-8") from None
    return np.array(rows, np.int64).reshape(-1, window)


def _hash(windows: npt.NDArray[Any]) -> str:
    import hashlib

    return hashlib.sha256(windows.tobytes()).hexdigest()
