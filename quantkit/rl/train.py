"""Training an adapter on a packed base: what all methods share, and supervised priming and GRPO."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import AdapterError, MissingDependencyError
from quantkit.rl.base import Base, bind, open_base, require_bound, require_unchanged
from quantkit.rl.data import Row, conversation, messages, read_template, require_marked
from quantkit.rl.folder import LOG, RUN, RunFolder
from quantkit.rl.options import DpoOptions, GrpoOptions, LoraOptions, SftOptions, TrainOptions
from quantkit.rl.rewards.checked import checked
from quantkit.versions import package_versions

Reward = Callable[..., list[float | None]]
ROW = "quantkit_row"  # number of a row, by which rewards find its other fields: a table would change their types


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
    for name in ("bitsandbytes", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
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


def prepare(base: Path, out: Path, options: TrainOptions, said: dict[str, Any], *, adapter: Path | None = None, template: Path | None = None,
            marked: bool = False, resume: bool = False, force: bool = False) -> Job:  # fmt: skip
    """Open the base and put an adapter on it (a new one, or the one of ``adapter``).

    said: what else makes runs differ. Raises a QuantkitError.
    """
    require_packages()
    import transformers

    from quantkit.modeling.training import save_memory
    from quantkit.rl.plugin_peft import DEFAULT_TARGETS, EXPERTS, lora_config, with_adapter, with_new_adapter

    options.accumulated  # noqa: B018 - raises for numbers that do not come out even
    if adapter is not None and adapter.resolve() == out.resolve():
        raise AdapterError(f"{out} is the adapter itself", hint="give another folder; --resume goes on with a run")
    quiet()
    transformers.set_seed(options.seed)
    opened = open_base(base, _dtype(options.device), options.device)
    kept = None if adapter is None else adapter / "chat_template.jinja"
    if template is not None:
        opened.tokenizer.chat_template = read_template(template, marked)
    elif kept is not None and kept.exists():
        opened.tokenizer.chat_template = kept.read_text(encoding="utf-8")  # what it was primed with
    if marked:
        require_marked(opened.tokenizer.chat_template, str(template or "the chat template"))
    identity = {"base": opened.digest, "options": options.as_json(), "template": opened.tokenizer.chat_template, **said}
    if adapter is not None:
        require_bound(adapter, opened)
        _require_same_rank(adapter, options.lora)
        identity["adapter"] = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
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


def _require_same_rank(adapter: Path, lora: LoraOptions) -> None:
    """Raise AdapterError if an adapter to go on from has another rank than was asked for."""
    has = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    if lora != LoraOptions() and lora.rank != has:
        raise AdapterError(f"{adapter} has rank {has}, not {lora.rank}", hint="leave out --rank to go on from it")


def finish(job: Job, trainer: Any) -> Outcome:
    """Train, make sure that the base is what it was, and write the adapter."""
    started = time.perf_counter()
    last = job.folder.last_checkpoint() if job.resume else None
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    require_unchanged(job.base, job.model)
    job.model.save_pretrained(str(job.folder.path), selected_adapters=["default"])
    job.base.tokenizer.save_pretrained(str(job.folder.path))
    bind(job.folder.path, job.base)
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


def sft(base: Path, rows: list[Row], out: Path, options: SftOptions | None = None, *, template: Path | None = None, system: str | None = None,
        adapter: Path | None = None, resume: bool = False, force: bool = False) -> Outcome:  # fmt: skip
    """Supervised priming on rows with ``prompt`` and ``completion`` (texts or messages) or with ``messages``.

    The loss counts only what the model says; with ``messages`` the template must mark it. Raises a QuantkitError.
    """
    options = options or SftOptions()
    marked = "messages" in rows[0]
    job = prepare(base, out, options, {"method": "sft", "data": _fingerprint(rows), "system": system}, adapter=adapter,
                  template=template, marked=marked, resume=resume, force=force)  # fmt: skip
    from datasets import Dataset
    from trl import SFTConfig

    from quantkit.rl.plugin_saves import watch
    from quantkit.rl.plugin_trl import SftTrainer

    chat = marked or job.base.tokenizer.chat_template is not None
    first = [{"role": "system", "content": system}] if system else []
    if marked:
        given = [{"messages": [*first, *row["messages"]]} for row in rows]
    else:
        given = [conversation(row, system) if chat else {k: row[k] for k in ("prompt", "completion")} for row in rows]
    job.begin()
    arguments = job.arguments(
        SFTConfig, max_length=options.max_length, completion_only_loss=None if marked else True, assistant_only_loss=marked,
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    trainer = SftTrainer(
        model=job.model, args=arguments, train_dataset=Dataset.from_list(given), processing_class=job.base.tokenizer
    )
    watch(trainer, job.folder)
    return finish(job, trainer)


def grpo(base: Path, rows: list[Row], rewards: Sequence[Reward], out: Path, options: GrpoOptions | None = None, *, adapter: Path | None = None,
         template: Path | None = None, system: str | None = None, tools: Sequence[Callable[..., Any]] = (), source: str = "",
         resume: bool = False, force: bool = False) -> Outcome:  # fmt: skip
    """Group-relative policy optimization on rows with ``prompt`` and whatever the rewards ask for.

    adapter: a primed one, to which the divergence (beta) is then measured. source: of the rewards, for example a hash; a run
    goes on only with the same. Raises a QuantkitError.
    """
    options = options or GrpoOptions()
    options.check(len(rewards), len(rows))
    names = [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]
    said = {"method": "grpo", "data": _fingerprint(rows), "system": system, "rewards": names, "source": source}
    job = prepare(base, out, options, said, adapter=adapter, template=template, resume=resume, force=force)
    from datasets import Dataset
    from trl import GRPOConfig

    from quantkit.rl.plugin_saves import watch
    from quantkit.rl.plugin_trl import GrpoTrainer
    from quantkit.rl.rollouts import engine_of

    chat = job.base.tokenizer.chat_template is not None
    prompts = [messages(row, system) if chat else row["prompt"] for row in rows]
    _require_short(job, prompts, options)
    given = [{"prompt": prompt, ROW: number} for number, prompt in enumerate(prompts)]
    arguments = job.arguments(
        GRPOConfig, num_generations=options.generations, max_completion_length=options.completion, temperature=options.temperature,
        top_p=options.top_p, top_k=options.top_k, min_p=options.min_p or None, beta=options.beta, epsilon=options.epsilon,
        epsilon_high=options.epsilon_high, loss_type=options.loss, mask_truncated_completions=options.mask_truncated,
        reward_weights=list(options.weights) or None, router_aux_loss_coef=0.0, vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=options.correction, remove_unused_columns=False,
    )  # fmt: skip
    with contextlib.closing(engine_of(options.engine, job.base, options.max_length)) as engine:
        job.begin()
        trainer = GrpoTrainer(
            model=job.model, reward_funcs=[checked(reward) for reward in rewards], args=arguments,
            train_dataset=Dataset.from_list(given), processing_class=job.base.tokenizer, engine=engine, tools=list(tools) or None,
            folder=job.folder, rows=rows,
        )  # fmt: skip
        watch(trainer, job.folder)
        return finish(job, trainer)


def _require_short(job: Job, prompts: list[Any], options: GrpoOptions) -> None:
    """Raise AdapterError for a prompt that leaves no room for a completion within ``max_length``."""
    tokenizer = job.base.tokenizer
    for number, prompt in enumerate(prompts, 1):
        text = (
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
        size = len(tokenizer(text, add_special_tokens=isinstance(prompt, str)).input_ids)
        if size + options.completion > options.max_length:
            raise AdapterError(
                f"the prompt of row {number} has {size} tokens; with a completion of {options.completion} that exceeds {options.max_length}",
                hint="raise --max-length, lower --completion, or leave the row out",
            )


def dpo(base: Path, rows: list[Row], out: Path, options: DpoOptions | None = None, *, adapter: Path | None = None,
        template: Path | None = None, system: str | None = None, resume: bool = False, force: bool = False) -> Outcome:  # fmt: skip
    """Preferences: rows with ``prompt``, ``chosen`` and ``rejected``, or (loss ``kto``) ``prompt``, ``completion`` and ``label``.

    The reference is the base, or base and ``adapter`` where training goes on from one. Raises a QuantkitError.
    """
    options = options or DpoOptions()
    said = {"method": options.loss, "data": _fingerprint(rows), "system": system}
    job = prepare(base, out, options, said, adapter=adapter, template=template, resume=resume, force=force)
    from datasets import Dataset
    from trl import DPOConfig, KTOConfig

    from quantkit.rl.plugin_saves import watch
    from quantkit.rl.plugin_trl import DpoTrainer, KtoTrainer

    names = ("chosen", "rejected") if options.loss == "dpo" else ("completion",)
    chat = job.base.tokenizer.chat_template is not None
    given = [
        {"prompt": messages(row, system) if chat else row["prompt"], **{name: _said(row[name], chat) for name in names},
         **({"label": bool(row["label"])} if options.loss == "kto" else {})}
        for row in rows
    ]  # fmt: skip
    job.begin()
    kind, trainer_class = (DPOConfig, DpoTrainer) if options.loss == "dpo" else (KTOConfig, KtoTrainer)
    arguments = job.arguments(kind, max_length=options.max_length, beta=options.beta, router_aux_loss_coef=0.0)
    trainer = trainer_class(
        model=job.model, args=arguments, train_dataset=Dataset.from_list(given), processing_class=job.base.tokenizer
    )
    watch(trainer, job.folder)
    return finish(job, trainer)


def _said(answer: Any, chat: bool) -> Any:
    """An answer as messages where prompts are."""
    return [{"role": "assistant", "content": answer}] if chat and isinstance(answer, str) else answer


def _fingerprint(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
