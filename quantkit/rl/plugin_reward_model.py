"""A score on a packed decoder, and TRL's trainer for it. Imported only inside functions: it needs transformers, peft and trl."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer

from quantkit.errors import AdapterError
from quantkit.rl.base import Base
from quantkit.rl.job import require_same_shape
from quantkit.rl.options import LoraOptions
from quantkit.rl.plugin_peft import DEFAULT_TARGETS, EXPERTS, lora_config, with_new_adapter
from quantkit.rl.plugin_saves import Saves

TASK = "SEQ_CLS"  # PEFT then trains and keeps the head ``score`` beside the pairs
HEAD = "base_model.model.score.weight"  # its name in the file of an adapter


class ScoreHead(nn.Linear):
    """Hidden states (..., width) to scores (..., 1), in float32 whatever type the hidden states have."""

    def __init__(self, width: int, deviation: float) -> None:
        super().__init__(width, 1, bias=False)
        nn.init.normal_(self.weight, std=deviation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float())


def scorer(base: Base) -> Any:
    """transformers' sequence classifier with one label: the base's own decoder, and a head that is not trained yet.

    It scores at the last token that is no padding. Raises AdapterError if transformers has none for the architecture.
    """
    config = copy.deepcopy(base.model.config)
    config.num_labels, config.pad_token_id = 1, base.tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        found = {name for name, _ in model.named_children()}
    except ValueError:
        found = set()
    if found != {"model", "score"}:
        raise AdapterError(f"transformers has no classifier for {config.model_type}", hint="take a base of another architecture")
    model.model = base.model.model
    model.score = ScoreHead(config.hidden_size, config.initializer_range).to(base.model.device)
    return model.eval()


def new_scorer(base: Base, options: LoraOptions, adapter: Path | None) -> PeftModel:
    """A scorer with pairs to train, new ones or those of ``adapter``. Raises AdapterError if these do not fit."""
    model = scorer(base)
    if adapter is None:
        targets = DEFAULT_TARGETS + ((EXPERTS,) if options.experts else ())
        config = lora_config(model, options.rank, options.alpha, targets, lora_dropout=options.dropout, use_rslora=options.rslora)
        config.task_type = TASK
        return with_new_adapter(model, config)
    try:
        config = LoraConfig.from_pretrained(str(adapter))
        config.task_type, config.inference_mode, config.modules_to_save = TASK, False, None
        begun = {HEAD: model.score.weight.detach().clone(), **load_file(adapter / "adapter_model.safetensors")}
        made = with_new_adapter(model, config)
        set_peft_model_state_dict(made, begun)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise AdapterError(f"{adapter} does not fit the model ({error})", hint="give a folder that training wrote") from None
    require_same_shape(adapter, options)
    return made


def scores(model: Any, sequences: Sequence[list[int]], pad: int, batch: int, column: int = 0) -> list[float]:
    """One score for each sequence of token ids, padded on the right, ``batch`` at a time. column: of the logits.

    The order of the sequences changes nothing, to the bit.
    """
    training = model.training
    model.eval()
    different = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (-len(ids), ids))
    found: dict[tuple[int, ...], float] = {}
    for first in range(0, len(different), batch):
        part = different[first : first + batch]
        given = torch.full((len(part), len(part[0])), pad)
        mask = torch.zeros_like(given)
        for row, ids in enumerate(part):
            given[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        with torch.no_grad():
            logits = model(input_ids=given.to(model.device), attention_mask=mask.to(model.device)).logits
        found |= dict(zip(part, logits[:, column].tolist(), strict=True))
    model.train(training)
    return [found[tuple(ids)] for ids in sequences]


class PairTrainer(Saves, RewardTrainer):
    """Bradley-Terry on pairs of token ids: the loss is −log σ(score of the chosen − score of the rejected)."""
