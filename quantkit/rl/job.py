"""What all methods of training share: a run before it starts, and how it ends."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import AdapterError, MissingDependencyError
from quantkit.rl.base import Base, bind, open_base, require_bound, require_unchanged
from quantkit.rl.data import Row, require_marked
from quantkit.rl.drawing import choose_template
from quantkit.rl.folder import LOG, RUN, RunFolder
from quantkit.rl.options import LoraOptions, TrainOptions
from quantkit.versions import package_versions


@dataclass(frozen=True)
class Outcome:
    """folder: of the run. log: what was logged, a step each."""

    folder: Path
    base: str
    steps: int
    seconds: float
    log: list[dict[str, Any]]


def require_packages() -> None:
    """Raise MissingDependencyError if TRL or PEFT is not installed."""
    for name in ("bitsandbytes", "trl", "accelerate"):  # before they are imported, when some of them advise
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"training needs {error.name}", hint='pip install "quantkit-llm[rl]"') from None


def quiet() -> None:
    """No progress bars and advice from the libraries on our stderr."""
    import datasets

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "Unsupported layer type", module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@dataclass
class Job:
    """One run before it starts: its folder, base, model with adapter, and options. identity: what makes runs differ."""

    folder: RunFolder
    base: Base
    model: Any
    options: TrainOptions
    identity: dict[str, Any]
    resume: bool
    force: bool

    def begin(self) -> None:
        """Make the folder, or find it as it was left; after everything was checked. Raises OutputError, AdapterError."""
        RunFolder.begin(self.folder.path, self.identity, self.resume, self.force)

    def arguments(self, kind: Any, **more: Any) -> Any:
        """TRL's configuration: what all methods have, and ``more``."""
        options = self.options
        return kind(
            output_dir=str(self.folder.checkpoints), per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulated, num_train_epochs=options.epochs, max_steps=options.steps or -1,
            learning_rate=options.learning_rate, warmup_steps=options.warmup, lr_scheduler_type="cosine",
            seed=options.seed, data_seed=options.seed, logging_steps=options.log_every, save_steps=options.save_every,
            save_strategy="steps", save_total_limit=2, report_to=list(options.loggers), use_cpu=options.device == "cpu",
            bf16=False, gradient_checkpointing=False, dataloader_pin_memory=options.device != "cpu", disable_tqdm=True,
            log_level="error", optim="adamw_torch", **more,
        )  # fmt: skip


def open_for(base: Path, options: TrainOptions) -> Base:
    """The base on the device that it is trained on, all random numbers begun anew. Raises a QuantkitError."""
    require_packages()
    import transformers

    options.accumulated  # noqa: B018 - raises for numbers that do not come out even
    quiet()
    transformers.set_seed(options.seed)
    return open_base(base, _dtype(options.device), options.device)


def prepare(base: Path, out: Path, options: TrainOptions, said: dict[str, Any], *, adapter: Path | None = None, template: Path | None = None,
            marked: bool = False, resume: bool = False, force: bool = False) -> Job:  # fmt: skip
    """Open the base and put an adapter on it (a new one, or the one of ``adapter``).

    said: what else makes runs differ. Raises a QuantkitError.
    """
    require_other(adapter, out)
    opened = open_for(base, options)
    from quantkit.modeling.training import save_memory
    from quantkit.rl.plugin_peft import DEFAULT_TARGETS, EXPERTS, lora_config, with_adapter, with_new_adapter

    choose_template(opened, template, adapter, marked)
    if marked:
        require_marked(opened.tokenizer.chat_template, str(template or "the chat template"))
    identity = {"base": opened.digest, "options": options.as_json(), "template": opened.tokenizer.chat_template, **said}
    if adapter is not None:
        identity["adapter"] = bound_weights(adapter, opened)
        require_same_shape(adapter, options.lora)
        model = with_adapter(opened.model, str(adapter), trainable=True)
    else:
        lora = options.lora
        targets = DEFAULT_TARGETS + ((EXPERTS,) if lora.experts else ())
        config = lora_config(opened.model, lora.rank, lora.alpha, targets, lora_dropout=lora.dropout, use_rslora=lora.rslora)
        model = with_new_adapter(opened.model, config)
    if options.save_memory:
        save_memory(model.get_base_model())
    return Job(RunFolder(out), opened, model, options, identity, resume, force)


def _dtype(device: str) -> Any:
    """Type of activations on a device. Raises AdapterError for a GPU beside others, which the trainer would take as well."""
    import torch

    if not device.startswith("cuda"):
        return None
    if torch.cuda.device_count() > 1 or device not in ("cuda", "cuda:0"):
        raise AdapterError(
            f"{device} of {torch.cuda.device_count()} GPUs",
            hint="set CUDA_VISIBLE_DEVICES to the one to train on, and give --device cuda",
        )
    return torch.bfloat16


def require_other(adapter: Path | None, out: Path) -> None:
    """Raise AdapterError if an adapter to go on from lies where the run is to be written."""
    if adapter is not None and adapter.resolve() == out.resolve():
        raise AdapterError(f"{out} is the adapter itself", hint="give another folder; --resume goes on with a run")


def bound_weights(adapter: Path, base: Base) -> str:
    """SHA-256 of the weights of an adapter to go on from. Raises AdapterError if it belongs to another base."""
    require_bound(adapter, base)
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def require_same_shape(adapter: Path, lora: LoraOptions) -> None:
    """Raise AdapterError if an adapter to go on from is not as what was asked for (what is as by default was not asked for)."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    experts = "experts" in config["target_modules"]
    has = LoraOptions(config["r"], config["lora_alpha"], config["lora_dropout"], bool(config.get("use_rslora")), experts)
    for name, value in vars(lora).items():
        if value != vars(LoraOptions())[name] and value != vars(has)[name]:
            raise AdapterError(
                f"{adapter} has {name} {vars(has)[name]}, not {value}", hint=f"leave out --{name} to go on from it"
            )


def save_adapter(job: Job, around: Any = None) -> None:
    """Write the adapter into the run's folder, after making sure that the base is what it was.

    around: the whole model, where the adapter is on a part of it.
    """
    require_unchanged(job.base, around or job.model)
    job.model.save_pretrained(str(job.folder.path), selected_adapters=["default"])
    job.base.tokenizer.save_pretrained(str(job.folder.path))
    bind(job.folder.path, job.base)


def finish(job: Job, trainer: Any, save: Callable[[Job], None] = save_adapter) -> Outcome:
    """Train, with the log in the folder and in the terminal, and save what was learned."""
    from quantkit.rl.plugin_saves import watched

    started = time.perf_counter()
    last = job.folder.last_checkpoint() if job.resume else None
    with watched(trainer, job.folder):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    save(job)
    seconds = time.perf_counter() - started
    said = json.loads((job.folder.path / RUN).read_text())["run"]
    job.folder.write(
        RUN,
        {
            "run": said,
            "seconds": seconds,
            "steps": trainer.state.global_step,
            "versions": package_versions("torch", "trl", "peft"),
        },
    )
    job.folder.write_lines(LOG, trainer.state.log_history)
    return Outcome(job.folder.path, job.base.name, trainer.state.global_step, seconds, trainer.state.log_history)


def fingerprint(rows: list[Row]) -> str:
    """A hash of the rows, by which a run knows its data again."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
