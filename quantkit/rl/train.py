"""Training an adapter on a packed base: supervised priming, group-relative policy optimization, preferences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import AdapterError
from quantkit.rl.data import Row, conversation, messages
from quantkit.rl.job import Job, Outcome, fingerprint, finish, prepare
from quantkit.rl.options import DpoOptions, GrpoOptions, SftOptions
from quantkit.rl.rewards.checked import checked

Reward = Callable[..., list[float | None]]
ROW = "quantkit_row"  # number of a row, by which rewards find its other fields: a table would change their types


def sft(base: Path, rows: list[Row], out: Path, options: SftOptions | None = None, *, template: Path | None = None, system: str | None = None,
        adapter: Path | None = None, resume: bool = False, force: bool = False) -> Outcome:  # fmt: skip
    """Supervised priming on rows with ``prompt`` and ``completion`` (texts or messages) or with ``messages``.

    The loss counts only what the model says; with ``messages`` the template must mark it. Raises a QuantkitError.
    """
    options = options or SftOptions()
    marked = "messages" in rows[0]
    job = prepare(base, out, options, {"method": "sft", "data": fingerprint(rows), "system": system}, adapter=adapter,
                  template=template, marked=marked, resume=resume, force=force)  # fmt: skip
    from datasets import Dataset
    from trl import SFTConfig

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
    return finish(job, trainer)


def grpo(base: Path, rows: list[Row], rewards: Sequence[Reward], out: Path, options: GrpoOptions | None = None, *, adapter: Path | None = None,
         template: Path | None = None, system: str | None = None, tools: Sequence[Callable[..., Any]] = (), source: str = "",
         resume: bool = False, force: bool = False) -> Outcome:  # fmt: skip
    """Group-relative policy optimization on rows with ``prompt`` and whatever the rewards ask for.

    adapter: a primed one, to which the divergence (beta) is then measured. tools: functions that completions may call.
    source: of the rewards and tools, for example a hash; a run goes on only with the same. Raises a QuantkitError.
    """
    options = options or GrpoOptions()
    options.check(len(rewards), len(rows), len(tools))
    names = [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]
    said = {
        "method": "rloo" if options.loss == "rloo" else "grpo",
        "data": fingerprint(rows),
        "system": system,
        "rewards": names,
        "source": source,
        "tools": [tool.__name__ for tool in tools],
    }
    job = prepare(base, out, options, said, adapter=adapter, template=template, resume=resume, force=force)
    from datasets import Dataset

    from quantkit.rl.rollouts import engine_of
    from quantkit.rl.tools import require_template

    if tools:
        require_template(job.base.tokenizer)
    chat = job.base.tokenizer.chat_template is not None
    prompts = [messages(row, system) if chat else row["prompt"] for row in rows]
    _require_short(job, prompts, options, tools)
    given = [{"prompt": prompt, ROW: number} for number, prompt in enumerate(prompts)]
    kind, arguments, more = _policy_trainer(job, options, tools)
    with contextlib.closing(engine_of(options, job.base)) as engine:
        job.begin()
        trainer = kind(
            model=job.model, reward_funcs=[checked(reward) for reward in rewards], args=arguments, folder=job.folder, rows=rows,
            train_dataset=Dataset.from_list(given), processing_class=job.base.tokenizer, engine=engine, window=options.max_length, **more,
        )  # fmt: skip
        return finish(job, trainer)


def _policy_trainer(job: Job, options: GrpoOptions, tools: Sequence[Callable[..., Any]]) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer's class, its configuration, and what else it takes."""
    from trl import GRPOConfig, RLOOConfig

    from quantkit.rl.plugin_rollouts import GrpoTrainer, RlooTrainer

    common = {
        "num_generations": options.generations, "max_completion_length": options.completion, "temperature": options.temperature,
        "top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p or None, "beta": options.beta,
        "epsilon": options.epsilon, "epsilon_high": options.epsilon_high, "reward_weights": list(options.weights) or None,
        "mask_truncated_completions": options.mask_truncated, "router_aux_loss_coef": 0.0, "remove_unused_columns": False,
    }  # fmt: skip
    if options.loss == "rloo":
        return RlooTrainer, job.arguments(RLOOConfig, **common), {}
    corrected = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": options.correction}
    arguments = job.arguments(
        GRPOConfig, loss_type=options.loss, max_tool_calling_iterations=options.turns, **corrected, **common
    )
    return GrpoTrainer, arguments, {"tools": list(tools) or None}


def _require_short(job: Job, prompts: list[Any], options: GrpoOptions, tools: Sequence[Callable[..., Any]]) -> None:
    """Raise AdapterError for a prompt that leaves no room for a completion within ``max_length``."""
    tokenizer = job.base.tokenizer
    for number, prompt in enumerate(prompts, 1):
        text = (
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tools=list(tools) or None, tokenize=False, add_generation_prompt=True)
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
    said = {"method": options.loss, "data": fingerprint(rows), "system": system}
    job = prepare(base, out, options, said, adapter=adapter, template=template, resume=resume, force=force)
    from datasets import Dataset
    from trl import DPOConfig, KTOConfig

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
    return finish(job, trainer)


def _said(answer: Any, chat: bool) -> Any:
    """An answer as messages where prompts are."""
    return [{"role": "assistant", "content": answer}] if chat and isinstance(answer, str) else answer
