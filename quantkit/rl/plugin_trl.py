"""TRL's trainers on packed bases. Imported only inside functions: it needs trl.

TRL scores tokens with the head's floating-point weights; a packed head has none, so ``scored`` gives a model TRL's own
output from its parts in the vocabulary. The rest is TRL's. Trainers that draw completions are in ``plugin_rollouts``.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from quantkit.errors import AdapterError
from quantkit.modeling.modules import QuantLinear
from quantkit.modeling.training import IGNORED, token_scores
from quantkit.rl.base import without_adapter
from quantkit.rl.plugin_saves import Saves


def scored(model: Any, temperature: float = 1.0) -> None:
    """Let ``model(…, labels=…, fused_lm_head=True)`` work with a packed head, as TRL's trainers call it.

    Per-token results are those of TRL's own head: zero where a label is −100. Only log-probabilities have gradients.
    """
    inner = without_adapter(model)
    if not isinstance(inner.get_output_embeddings(), QuantLinear):
        return
    plain = types.MethodType(type(inner).forward, inner)

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        if not fused_lm_head:
            given = {"labels": labels} if labels is not None else {}
            return plain(*args, **given, **kwargs)
        if kwargs.get("output_router_logits"):
            raise AdapterError("a packed base has no load-balancing loss", hint="leave the router's loss out")
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        return _scores(hidden, self.get_output_embeddings(), labels[:, 1:], temperature, num_items_in_batch)

    inner.forward = types.MethodType(forward, inner)


def _scores(hidden: Tensor, head: Any, labels: Tensor, temperature: float, count: Any) -> FusedCausalLMOutput:
    mask = labels != IGNORED
    found = token_scores(hidden[mask], head, labels[mask], temperature)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    log_probs = placed(found.log_probabilities)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=placed(found.entropy), is_top1=placed(found.likeliest),
        mean_logits=placed(found.mean_logit), label_mask=mask,
    )  # fmt: skip


class _OnPackedHead(Saves):
    """What trainers without a temperature share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scored(self.model)  # type: ignore[attr-defined]


class SftTrainer(_OnPackedHead, SFTTrainer):
    """Supervised training; the loss of every token counts alike, however batches are accumulated."""


class DpoTrainer(_OnPackedHead, DPOTrainer):
    """Preferences in pairs; the reference is the model without the adapter, or with the one that training began with."""


class KtoTrainer(_OnPackedHead, KTOTrainer):
    """Single answers marked good or bad."""
