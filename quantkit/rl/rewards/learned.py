"""Rewards that a model learned: a folder that ``quantkit rl reward-model`` wrote, or a sequence classifier of transformers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import read_json
from quantkit.errors import QuantkitError, RewardError
from quantkit.rl.data import conversation
from quantkit.rl.rewards.base import Reward, excerpt, named, text_of

UNKNOWN_LIMIT = 1_000_000  # tokenizers say this or more where they know no limit


@dataclass(frozen=True)
class Scorer:
    """A classifier, ready to score. column: of its logits. limit: tokens of a sequence at most, None for any."""

    model: Any
    tokenizer: Any
    column: int
    limit: int | None


def learned(
    path: str | Path, base: str | Path | None = None, *, label: str | int | None = None, alone: bool = False, batch: int = 8,
    limit: int | None = None, device: str = "cpu", name: str = "learned",
) -> Reward:  # fmt: skip
    """The score that a model gives a prompt with its completion, whatever its range.

    path: a folder that ``quantkit rl reward-model`` wrote (with its ``base``), or a saved sequence classifier of
    transformers (safetensors, no code of its own) with one label, or with the one chosen by ``label``, whose logit is
    taken. alone: score the completion without its prompt. limit: tokens at most, the last ones count; by default as many
    as the model was trained with. See ``token_ids`` for how texts and messages are put together.

    It is loaded when it is first called. Raises RewardError, then or now, for a folder that is neither, or of another base.
    """
    path = Path(path)
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise RewardError(
            f"{path} is no model that scores", hint="give a folder of `quantkit rl reward-model`, or a classifier's"
        )
    adapter = (path / "adapter_config.json").exists()
    if adapter != (base is not None):
        what, way = ("is an adapter", "give its base as well") if adapter else ("is a whole model", "leave out the base")
        raise RewardError(f"{path} {what}", hint=f"{way}: learned(path, base)")

    @functools.cache
    def load() -> Scorer:
        import torch

        with torch.random.fork_rng():  # weights that are replaced at once are drawn on the way: training must not notice
            found = _reward_model(path, Path(str(base)), device) if adapter else _classifier(path, label, device)
        return found if limit is None else replace(found, limit=limit)

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            scorer = load()
        except QuantkitError as error:
            raise RewardError(error.what, hint=error.hint) from None
        from quantkit.rl.plugin_reward_model import scores

        given: list[Any] = [None] * len(completions) if alone else prompts
        ids = [token_ids(scorer.tokenizer, prompt, said, scorer.limit) for prompt, said in zip(given, completions, strict=True)]
        return [*scores(scorer.model, ids, scorer.tokenizer.pad_token_id, batch, scorer.column)]

    return named(name, reward)


def token_ids(tokenizer: Any, prompt: Any, completion: Any, limit: int | None = None) -> list[int]:
    """A prompt (None: without one) and its completion as they are scored; both texts or messages.

    With a chat template both become messages and are rendered by it. Without one a text follows the other, ended by the
    token that ends a text; messages give their contents, one a line. limit: of longer ones the last tokens count. Raises
    RewardError for messages that the template refuses.
    """
    if prompt is not None and tokenizer.chat_template is not None:
        from jinja2 import TemplateError

        row = conversation({"prompt": prompt, "completion": completion}, None)
        try:
            text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        except TemplateError as error:
            what = f"the chat template refuses the prompt {excerpt(' '.join(_contents(prompt)))} with its answer ({error})"
            raise RewardError(what, hint="mend the row, or give a --template that takes it") from None
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids if limit is None else ids[-limit:]
    if prompt is None:
        text = text_of(completion)
    elif isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
    else:
        text = "\n".join([*_contents(prompt), text_of(completion)])
    end = tokenizer.eos_token_id
    cut = {} if limit is None else {"truncation": True, "max_length": limit - (end is not None)}
    ids = tokenizer(text, **cut).input_ids
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _contents(prompt: Any) -> list[str]:
    """The text of a prompt's messages."""
    return [prompt] if isinstance(prompt, str) else [text_of([{**message, "role": "assistant"}]) for message in prompt]


def _reward_model(path: Path, base: Path, device: str) -> Scorer:
    """A reward model on its base. Raises QuantkitError for another kind of adapter, or one of another base."""
    from quantkit.rl.job import quiet, require_packages

    require_packages()
    quiet()
    import torch

    from quantkit.rl.base import open_base, require_bound
    from quantkit.rl.drawing import choose_template
    from quantkit.rl.folder import RUN
    from quantkit.rl.plugin_peft import with_adapter
    from quantkit.rl.plugin_reward_model import TASK, scorer

    if read_json(path / "adapter_config.json").get("task_type") != TASK:
        raise RewardError(f"{path} is an adapter that writes, none that scores", hint="train one with `quantkit rl reward-model`")
    opened = open_base(base, torch.bfloat16 if device.startswith("cuda") else None, device)
    require_bound(path, opened)
    choose_template(opened, None, path)
    opened.tokenizer.truncation_side = "left"
    model = with_adapter(scorer(opened), str(path)).eval()
    return Scorer(model, opened.tokenizer, 0, int(read_json(path / RUN)["run"]["options"]["max_length"]))


def _classifier(path: Path, label: str | int | None, device: str) -> Scorer:
    """A saved classifier. Raises RewardError if it cannot be loaded, lacks weights, or needs a label to be chosen."""
    from quantkit.rl.job import require_packages

    require_packages()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from quantkit.modeling.skeleton import quiet

    quiet()
    if not any(path.glob("*.safetensors")):
        raise RewardError(f"{path} has no weights in safetensors", hint="save it with save_pretrained of a recent transformers")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            str(path), use_safetensors=True, dtype=dtype, output_loading_info=True, **own
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path), **own)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(
            f"{path} cannot be loaded as a sequence classifier ({first})", hint="give a folder that save_pretrained wrote"
        ) from None
    if loaded["missing_keys"]:
        raise RewardError(f"{path} has no weights for {sorted(loaded['missing_keys'])[0]}", hint="give a model trained to score")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RewardError(f"the tokenizer in {path} has no token for padding", hint="set pad_token and save it again")
    tokenizer.truncation_side = "left"
    config = model.config.get_text_config()
    config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token that is none
    known = tokenizer.model_max_length
    limit = known if known < UNKNOWN_LIMIT else getattr(config, "max_position_embeddings", None)
    return Scorer(model.to(device).eval(), tokenizer, _column(model.config, label, path), limit)


def _column(config: Any, label: str | int | None, path: Path) -> int:
    """Which logit is the score. Raises RewardError for a label that is unknown, or for several of which none is chosen."""
    names = {int(number): str(word) for number, word in config.id2label.items()}
    shown = ", ".join(f"{number} ({word})" for number, word in sorted(names.items()))
    if label is None and len(names) == 1:
        return 0
    if label is None:
        raise RewardError(f"{path} has {len(names)} labels", hint=f"choose one with label=: {shown}")
    found = [number for number, word in names.items() if label in (number, word)]
    if not found:
        raise RewardError(f"{path} has no label {label!r}", hint=f"it has {shown}")
    return found[0]
