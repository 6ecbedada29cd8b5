"""TRL's trainers on packed bases. Imported only inside functions: it needs trl.

TRL scores tokens with the head's floating-point weights; a packed head has none, so ``scored`` gives a model TRL's own
output from its parts in the vocabulary. The rest is TRL's, but for rollouts (``GrpoTrainer``): every engine reports
the log-probabilities of what it drew, and TRL's correction of importance is applied to all of them.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from quantkit.errors import AdapterError
from quantkit.modeling.modules import QuantLinear
from quantkit.modeling.training import IGNORED, token_scores
from quantkit.rl.base import without_adapter
from quantkit.rl.folder import SAMPLES, RunFolder
from quantkit.rl.plugin_saves import Saves
from quantkit.rl.rollouts import Engine, Sampling

SAMPLED = 20  # times that samples are kept in a run


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


class GrpoTrainer(Saves, GRPOTrainer):
    """Group-relative policy optimization whose completions come from an ``Engine``.

    folder: takes samples. rows: whose fields rewards get, by the data set's column ``quantkit_row``.
    """

    def __init__(self, *args: Any, engine: Engine, folder: RunFolder, rows: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows, self._fields = rows, sorted({name for row in rows for name in row} - {"prompt", "completion"})
        scored(self.model, self.temperature)
        self.engine, self.folder = engine, folder
        self._turn = (-1, 0)  # step, and calls of the engine in it
        self._samples = folder.lines(SAMPLES)
        self._scored: dict[str, Any] = {}
        self.use_vllm = True  # only its correction: completions come from ``engine``, vLLM is never asked

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, **ignored: Any) -> Any:  # fmt: skip
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            found = self.engine.complete(model, prompt_ids, self._sampling())
        finally:
            model.train(training)
        return found.ids, found.log_probabilities

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        begin = type(sampler).__iter__

        class ByEpoch(type(sampler)):  # type: ignore[misc]
            """TRL's order of the rows, which goes on where a stopped run was: each epoch has a seed of its own."""

            def __iter__(inner) -> Any:
                epoch = int((self.state.epoch or 0) + 1e-6)
                inner.generator.manual_seed(self.args.seed + 1_000_003 * epoch)
                return begin(inner)

        sampler.__class__ = ByEpoch
        return sampler

    def _sampling(self) -> Sampling:
        """How completions are drawn, as the trainer's options say."""
        step = self.state.global_step
        self._turn = (step, self._turn[1] + 1 if self._turn[0] == step else 0)
        return Sampling(
            self.max_completion_length, self.temperature, self.eos_token_ids, self._tokenizer.pad_token_id, self.args.seed,
            *self._turn, self.args.top_k or 0, self.args.top_p, self.args.min_p or 0.0,
        )  # fmt: skip

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        chosen = [self._rows[row["quantkit_row"]] for row in inputs]
        given = [
            {"prompt": prompt, **{name: row.get(name) for name in self._fields}}
            for prompt, row in zip(prompts, chosen, strict=True)
        ]
        found = super()._calculate_rewards(given, prompts, completions, ids)
        mode = "train" if self.model.training else "eval"
        total = (found * self.reward_weights.to(found.device)).nansum(1).reshape(-1, self.num_generations)
        for name, share in dead_groups(total).items():
            self._metrics[mode][f"groups/{name}"].append(share)
        self._scored = {"prompts": prompts, "completions": completions, "rewards": found}
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        step, kept = self.state.global_step, self._scored
        if self.model.training and step % max(1, self.state.max_steps // SAMPLED) == 0:
            self._samples = [row for row in self._samples if row["step"] != step]
            for place in range(min(2 * self.num_generations, len(kept["completions"]))):
                rewards = dict(zip(self.reward_func_names, kept["rewards"][place].tolist(), strict=True))
                self._samples.append({
                    "step": step, "group": place // self.num_generations, "prompt": transcript(kept["prompts"][place]),
                    "completion": transcript(kept["completions"][place]), "rewards": {k: None if v != v else v for k, v in rewards.items()},
                    "advantage": float(out["advantages"][place]),
                })  # fmt: skip
            self.folder.write_lines(SAMPLES, self._samples)
        return out


def dead_groups(rewards: Tensor) -> dict[str, float]:
    """Shares of groups that teach nothing because all their rewards are equal. rewards: (groups, generations).

    dead: all of them. dead_nothing: those without any reward above zero. dead_all: those in which all are above zero.
    """
    equal = (rewards - rewards[:, :1]).abs().amax(1) <= 1e-6
    nothing = equal & (rewards[:, 0] <= 0)
    return {
        "dead": float(equal.float().mean()),
        "dead_nothing": float(nothing.float().mean()),
        "dead_all": float((equal & ~nothing).float().mean()),
    }


def transcript(value: Any) -> str:
    """A prompt or completion as text: messages one below the other."""
    return (
        value
        if isinstance(value, str)
        else "\n".join(f"{m.get('role', '')}: {m.get('content') or m.get('tool_calls') or ''}" for m in value)
    )
