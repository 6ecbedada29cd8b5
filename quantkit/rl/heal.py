"""Healing: bringing the outputs of a quantized model back to the original's, by an adapter or by its own scales."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.errors import AdapterError
from quantkit.modeling.text import TextEncoder
from quantkit.rl.export import require_gguf, write_healed
from quantkit.rl.folder import RunFolder
from quantkit.rl.job import Job, Outcome, finish, open_for, prepare, require_packages, save_adapter
from quantkit.rl.options import HealOptions, LoraOptions

HELD = 10  # every so many-th window is kept to measure on
RATES = {"adapter": 1e-4, "scales": 5e-3}
ACTIVATIONS = ("INT8", "FP8", "FP4")
HEALED = "healed.gguf"


@dataclass(frozen=True)
class Healed:
    """Mean KL divergence from the original on windows that training did not see, nats/token: of the base, as training began, and
    at the end; all with rounded activations where they were asked for. file: the healed model, where scales learned."""

    outcome: Outcome
    base: float
    begun: float
    healed: float
    file: Path | None


def heal(
    base: Path, teacher: Path, texts: list[Path], out: Path, options: HealOptions | None = None, *, adapter: Path | None = None,
    resume: bool = False, force: bool = False,
) -> Healed:  # fmt: skip
    """Train on texts so that the base's outputs become the teacher's (KL divergence, every token alike).

    A tenth of the windows is kept to measure on. Scales are written into a new file of the base's own types, ``healed.gguf``
    in ``out``, whose divergence is the one of that very file. Raises AdapterError for a teacher of another vocabulary or too
    little text, and where scales are to learn, for a base that is no GGUF.
    """
    options = _completed(options or HealOptions())
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
    if len(kept) < options.batch:
        raise AdapterError(
            f"{len(kept)} windows to train on, {options.batch} in a batch", hint="lower --batch, or give more text"
        )
    said = {"method": "qat", "teacher": original.identity, "data": hashlib.sha256(windows.tobytes()).hexdigest()}
    if options.learn == "scales":
        if adapter is not None or options.lora != LoraOptions() or not options.residual:
            raise AdapterError("scales learn without an adapter", hint="leave out the adapter's options, or --learn adapter")
        job, save = _scales(base, out, options, said, resume, force), save_scales
    else:
        job, save = prepare(base, out, options, said, adapter=adapter, resume=resume, force=force), save_adapter
    return _train(job, save, original, held, kept, new=adapter is None)


def _completed(options: HealOptions) -> HealOptions:
    """Options with what follows from others. Raises AdapterError for unknown names."""
    if options.learn not in RATES:
        raise AdapterError(f"nothing called {options.learn!r} learns", hint=f"choose one of {', '.join(RATES)}")
    if options.activations not in (None, *ACTIVATIONS):
        raise AdapterError(f"no activations {options.activations!r}", hint=f"choose one of {', '.join(ACTIVATIONS)}")
    return replace(options, learning_rate=options.learning_rate or RATES[options.learn])


def _scales(base: Path, out: Path, options: HealOptions, said: dict[str, Any], resume: bool, force: bool) -> Job:
    """A run in which scales, minimums, norms and biases learn."""
    opened = open_for(base, options)
    from quantkit.modeling.skeleton import tensor_names
    from quantkit.modeling.training import save_memory
    from quantkit.rl.plugin_heal import Learned

    source = require_gguf(opened)
    learned = Learned(opened.model, lambda name: source.info(tensor_names(source, name)[0]).dtype == "F32")
    if options.save_memory:
        save_memory(opened.model)
    told = {name: value for name, value in options.as_json().items() if name not in ("lora", "residual")}
    identity = {"base": opened.digest, "options": told, **said}
    return Job(RunFolder(out), opened, learned, options, identity, resume, force)


def save_scales(job: Job) -> None:
    """Write the base with what was learned as ``healed.gguf`` into the run's folder."""
    from quantkit.modeling.packed import tensor_of
    from quantkit.modeling.skeleton import row_order, tensor_names

    source, found = require_gguf(job.base), {}
    for name, scales in job.model.scales.items():
        tensor, rows = tensor_of(source, name), scales.pack()
        if source.family.permutes_qk and source.info(tensor).experts == 1:
            rows = rows[np.argsort(row_order(source, tensor))]
        found[tensor] = rows
    for name, value in job.model.vectors.items():
        tensor = tensor_names(source, name)[0]
        change = (value.detach() - job.model.begun[name]).cpu().numpy()[np.argsort(row_order(source, tensor))]
        found[tensor] = np.ascontiguousarray(source.read(tensor) + change, "<f4").view(np.uint8).reshape(1, -1)
    write_healed(job.base, found, job.folder.path / HEALED, f"{job.base.name}, healed")


def _train(
    job: Job, save: Callable[[Job], None], original: Checkpoint, held: npt.NDArray[np.int64], kept: npt.NDArray[np.int64], new: bool
) -> Healed:  # fmt: skip
    """Measure, train, measure. held, kept: windows to measure and to train on. new: the adapter is not trained yet."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from quantkit.modeling.packed import packed_model
    from quantkit.rl.plugin_heal import HealTrainer, begin_with_residual, mean_divergence, round_inputs

    options = job.options
    assert isinstance(options, HealOptions)
    job.begin()
    master = packed_model(original, job.base.model.dtype, options.device)
    if options.activations:
        round_inputs(job.model, options.activations)
    if options.learn == "adapter":
        with job.model.disable_adapter():
            plain = mean_divergence(job.model, master, held)
        if options.residual and new:
            begin_with_residual(job.model, master)
    begun = mean_divergence(job.model, master, held)
    trainer = HealTrainer(
        model=job.model, args=job.arguments(TrainingArguments, remove_unused_columns=False, dataloader_drop_last=True),
        train_dataset=Dataset.from_dict({"input_ids": kept.tolist()}).with_format("torch"), teacher=master,
    )  # fmt: skip
    outcome = finish(job, trainer, save)
    if options.learn == "adapter":
        return Healed(outcome, plain, begun, mean_divergence(job.model, master, held), None)
    file = job.folder.path / HEALED
    written = packed_model(open_checkpoint(file), job.base.model.dtype, options.device)
    if options.activations:
        round_inputs(written, options.activations)
    return Healed(outcome, begun, begun, mean_divergence(written, master, held), file)


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
