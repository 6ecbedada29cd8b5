"""What a user may choose about training, with defaults that work; what follows from it is computed, not asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import AdapterError

ENGINES = ("torch", "llama", "vllm")
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "rloo")
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class LoraOptions:
    """rank: of every pair. alpha: twice the rank unless given. experts: also every routed expert gets pairs."""

    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    rslora: bool = False
    experts: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """What every method has.

    steps: of the optimizer; 0 follows from epochs. batch: sequences in memory at a time; together: sequences of one step
    of the optimizer (a multiple of batch). save_every: steps from one checkpoint to the next. log_every: steps from one
    line of the log to the next. loggers: of transformers, for example ``tensorboard`` and ``wandb``.
    """

    steps: int = 0
    epochs: float = 1.0
    batch: int = 4
    together: int = 16
    learning_rate: float = 2e-4
    warmup: float = 0.05
    max_length: int = 1024
    seed: int = 0
    save_every: int = 50
    log_every: int = 1
    device: str = "cpu"
    save_memory: bool = False
    loggers: tuple[str, ...] = ()
    lora: LoraOptions = LoraOptions()

    @property
    def accumulated(self) -> int:
        """Batches of one step. Raises AdapterError if they do not come out even."""
        if self.batch < 1 or self.together % self.batch:
            raise AdapterError(
                f"{self.together} sequences a step are no multiple of a batch of {self.batch}", hint="change one of them"
            )
        return self.together // self.batch

    def as_json(self) -> dict[str, Any]:
        """As plain data, for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class SftOptions(TrainOptions):
    """Supervised priming: few rows, a few times over."""

    epochs: float = 2.0


@dataclass(frozen=True)
class GrpoOptions(TrainOptions):
    """generations: completions of a prompt, a group; together / generations prompts make a step.

    beta: weight of the divergence from the model that training began with (0: none). epsilon, epsilon_high: how far
    the ratio of probabilities may fall or rise before its gradient stops. loss: how tokens are averaged (see docs/rl.md), or
    ``rloo``. turns: times that a completion may call tools. cache: of the engine ``torch``; ``static`` has one size throughout.
    server: address of vLLM's, for the engine ``vllm``; server_folder: where adapters are written for it.
    mask_truncated: completions that did not end count for nothing. correction: at most this ratio of the trainer's to the
    engine's probability weighs a token.
    """

    steps: int = 100
    generations: int = 8
    together: int = 64
    batch: int = 8
    learning_rate: float = 2e-5
    completion: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    loss: str = "dapo"
    mask_truncated: bool = False
    correction: float = 3.0
    weights: tuple[float, ...] = ()
    engine: str = "torch"
    cache: str = "dynamic"
    turns: int = 5
    server: str | None = None
    server_folder: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As plain data. Where the server is makes no other run: it may go on with another."""
        return {name: value for name, value in super().as_json().items() if name not in ("server", "server_folder")}

    def check(self, rewards: int, rows: int, tools: int = 0) -> None:
        """Raise AdapterError for values that cannot be used with so many rewards, rows and tools."""
        if self.loss == "rloo" and (self.engine != "torch" or tools):
            raise AdapterError("rloo corrects for no engine and calls no tools", hint="use --engine torch without --tools")
        if self.generations < 2:
            raise AdapterError(f"groups of {self.generations} have no advantage", hint="--generations must be at least 2")
        if self.together % self.generations:
            raise AdapterError(
                f"{self.together} completions a step are no multiple of groups of {self.generations}", hint="change one of them"
            )
        if rows < self.together // self.generations:
            raise AdapterError(
                f"{rows} rows are too few for {self.together // self.generations} prompts a step",
                hint="give more, or lower --together",
            )
        if self.engine not in ENGINES:
            raise AdapterError(f"no engine {self.engine!r}", hint=f"choose one of {', '.join(ENGINES)}")
        if self.cache not in CACHES or (self.cache != "dynamic" and self.engine != "torch"):
            raise AdapterError(f"a {self.cache} cache of the engine {self.engine}", hint="--cache static is for --engine torch")
        if self.server_folder and self.engine != "vllm":
            raise AdapterError("--server-folder is for --engine vllm", hint="leave it out")
        if (self.engine == "vllm") != bool(self.server):
            raise AdapterError(
                "--engine vllm and --server belong together", hint="for example --engine vllm --server http://localhost:8000"
            )
        if self.loss not in LOSSES:
            raise AdapterError(f"no loss {self.loss!r}", hint=f"choose one of {', '.join(LOSSES)}")
        if self.temperature <= 0:
            raise AdapterError("completions are drawn at a temperature above 0", hint="1.0 is usual")
        if self.weights and len(self.weights) != rewards:
            raise AdapterError(f"{len(self.weights)} weights for {rewards} rewards", hint="give one for each, or none")


@dataclass(frozen=True)
class DpoOptions(TrainOptions):
    """beta: how strongly the adapter is held to the base. loss: ``dpo`` for pairs, ``kto`` for single marked answers."""

    learning_rate: float = 1e-5
    batch: int = 2
    beta: float = 0.1
    loss: str = "dpo"


@dataclass(frozen=True)
class HealOptions(TrainOptions):
    """What learns: ``adapter``, or ``scales`` (of blocks, with minimums, norms and biases), which the file itself then has.

    window: tokens of a sequence. residual: an adapter begins with the largest part of what quantizing took, and not with
    nothing. activations: INT8, FP8 or FP4, to which inputs of all maps are rounded while training and measuring.
    learning_rate: 0 stands for 1e-4 of an adapter, 5e-3 of scales.
    """

    learning_rate: float = 0.0
    window: int = 256
    residual: bool = True
    learn: str = "adapter"
    activations: str | None = None
