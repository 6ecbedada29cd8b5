"""TRL's trainers that draw completions, from an engine of ours. Imported only inside functions: it needs trl.

Every engine reports the log-probabilities of what it drew.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from quantkit.rl.folder import SAMPLES, RunFolder
from quantkit.rl.plugin_saves import Saves
from quantkit.rl.plugin_trl import scored
from quantkit.rl.rollouts import Completions, Engine, Sampling

SAMPLED = 20  # times that samples are kept in a run


_Trainer: Any = object  # stands for TRL's, whose attributes are used below


class _Rollouts(Saves, _Trainer):
    """A trainer of TRL whose completions come from an ``Engine``.

    folder: takes samples. rows: whose fields rewards get, by the data set's column ``quantkit_row``. window: tokens of prompt
    and completion.
    """

    def __init__(
        self, *args: Any, engine: Engine, folder: RunFolder, rows: list[dict[str, Any]], window: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._window = window
        self._rows, self._fields = rows, sorted({name for row in rows for name in row} - {"prompt", "completion"})
        scored(self.model, self.temperature)
        self.engine, self.folder = engine, folder
        self._turn = (-1, 0)  # step, and calls of the engine in it
        self._samples = folder.lines(SAMPLES)
        self._scored: dict[str, Any] = {}

    def _complete(self, prompt_ids: list[list[int]]) -> Completions:
        """A completion for each prompt, by the model as it is now."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            room = max(1, self._window - max(map(len, prompt_ids)))  # after a tool answered, less than a whole completion
            found = self.engine.complete(model, prompt_ids, self._sampling(min(self.max_completion_length, room)))
        finally:
            model.train(training)
        return found

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

    def _sampling(self, count: int) -> Sampling:
        """How completions of ``count`` tokens at most are drawn, as the trainer's options say."""
        step = self.state.global_step
        self._turn = (step, self._turn[1] + 1 if self._turn[0] == step else 0)
        return Sampling(
            count, self.temperature, self.eos_token_ids, self._tokenizer.pad_token_id, self.args.seed,
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


class GrpoTrainer(_Rollouts, GRPOTrainer):
    """Group-relative policy optimization; TRL's correction of importance is applied to whatever engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_vllm, self.vllm_mode = True, "server"  # only its correction: vLLM itself is never asked

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, **ignored: Any) -> Any:  # fmt: skip
        found = self._complete(prompt_ids)
        return found.ids, found.log_probabilities


class RlooTrainer(_Rollouts, RLOOTrainer):
    """REINFORCE whose baseline is the mean reward of a prompt's other completions (arXiv 2402.14740); knows no correction."""

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> Any:
        return self._complete(prompt_ids).ids


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
