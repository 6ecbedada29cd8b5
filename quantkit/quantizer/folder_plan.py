"""What becomes of every tensor of a Hugging Face folder whose linear layers get one format.

Linear layers of the decoder are quantized. Embedding, head, norms, routers and biases stay as they are. Layers
that vLLM fuses (q, k and v; gate and up; all experts of a layer) must agree, so one that does not fit keeps the
others back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantkit.checkpoint import Checkpoint, HfCheckpoint, require_readable
from quantkit.checkpoint.roles import Role, layer_of, role_of
from quantkit.errors import CheckpointError, FormatError, PlanError
from quantkit.formats import formats
from quantkit.formats.tensors import TensorFormat, get_tensor_format, tensor_formats

HEAD = "lm_head"
FUSED = {
    Role.ATTN_Q: "qkv", Role.ATTN_K: "qkv", Role.ATTN_V: "qkv", Role.ATTN_O: "o", Role.FFN_GATE: "gate up", Role.FFN_UP: "gate up",
    Role.FFN_DOWN: "down", Role.EXPERT_GATE: "experts", Role.EXPERT_UP: "experts", Role.EXPERT_DOWN: "experts",
    Role.SHARED_GATE: "shared gate up", Role.SHARED_UP: "shared gate up", Role.SHARED_DOWN: "shared down",
}  # fmt: skip
# Formats whose experts transformers 5.23 loads, and those beside which it loads experts that are not quantized:
# tried with models of tests/tiny.py.
EXPERTS_LOAD = ("W4A16", "W4A16_G32", "FP8", "FP8_CHANNEL", "FP8_BLOCK", "MXFP4")
PLAIN_EXPERTS_LOAD = ("FP8", "FP8_CHANNEL", "FP8_BLOCK", "MXFP8", "NF4", "NF4_DQ", "FP4", "FP4_DQ")


@dataclass(frozen=True)
class FolderPlan:
    """Weights by their Hugging Face names.

    quantized: name → (rows, columns). kept: every other tensor → why. skipped: modules of linear layers that stay
    as they are, which the configuration must name; experts by the module that holds them all.
    """

    format: type[TensorFormat]
    quantized: dict[str, tuple[int, int]]
    kept: dict[str, str]
    skipped: list[str]
    notes: list[str]

    @property
    def name(self) -> str:
        """As a plan of a GGUF is named."""
        return f"uniform-{self.format.name}"

    @property
    def experts(self) -> bool:
        """Whether experts are quantized."""
        return any(".experts." in name for name in self.quantized)


def folder_format(plan: object, container: str | None) -> type[TensorFormat] | None:
    """The format of a plan ``uniform:NAME`` that is written as a safetensors folder; None if it becomes a GGUF.

    container: ``gguf`` or ``safetensors`` for names that both have, GGUF unless told. Raises PlanError if the
    container cannot hold the plan.
    """
    kind, _, name = plan.partition(":") if isinstance(plan, str) else ("", "", "")
    known = {f.name for f in tensor_formats()} if kind == "uniform" else set()
    both = {f.name for f in formats()}
    if container == "safetensors" and name.upper() not in known:
        raise PlanError(
            f"--container safetensors takes no {plan if isinstance(plan, str) else 'plan of its own'}",
            hint=f"--plan uniform:NAME with one of {', '.join(f.name for f in tensor_formats())}",
        )
    if container == "gguf" and name.upper() in known - both:
        raise PlanError(f"{name.upper()} is no format of GGUF", hint="leave out --container gguf")
    if name.upper() not in known or (container != "safetensors" and name.upper() in both):
        return None
    return get_tensor_format(name)


def plan_folder(source: HfCheckpoint, fmt: type[TensorFormat]) -> FolderPlan:
    """Decide for every tensor. Raises PlanError if nothing fits."""
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, str] = {}
    skipped: dict[str, None] = {HEAD: None}  # an ordered set
    groups: dict[tuple[int | None, str], list[str]] = {}
    for name, entry in ((name, entry) for shard in source.shards for name, entry in shard.entries.items()):
        target = source.family.to_gguf(name)
        role = role_of(target[0]) if target else Role.OTHER
        if target is not None and role in FUSED:
            shapes[name] = entry.shape
            groups.setdefault((layer_of(target[0]), FUSED[role]), []).append(name)
            continue
        kept[name] = f"never quantized ({role.value})"
        if role is Role.ROUTER:
            skipped[_module(name)] = None
    misfits = {name: reason for name, shape in shapes.items() if (reason := _misfit(fmt, shape))}
    for names in groups.values():
        wrong = next((name for name in names if name in misfits), None)
        for name in names if wrong is not None else ():
            kept[name] = misfits.get(name) or f"fused with {_module(wrong or '')} in vLLM, which does not fit"
            skipped[_skipped(name)] = None
    quantized = {name: (shape[0], shape[1]) for name, shape in shapes.items() if name not in kept}
    if not quantized:
        name = next(iter(misfits))
        fitting = ", ".join(f.name for f in tensor_formats() if f.loads_in and f.fits(shapes[name])) or "none"
        raise PlanError(f"no linear layer fits {fmt.name}; {name}: {misfits[name]}", hint=f"formats that fit it: {fitting}")
    plan = FolderPlan(fmt, quantized, kept, list(skipped), [])
    plan.notes.extend(_notes(plan, misfits))
    return plan


def require_source(checkpoint: Checkpoint, fmt: type[TensorFormat]) -> HfCheckpoint:
    """Raise CheckpointError unless the model is a plain Hugging Face folder, PlanError if no program loads the format."""
    if not isinstance(checkpoint, HfCheckpoint):
        raise CheckpointError(
            f"{checkpoint.path.name} is a GGUF, whose names and rows are llama.cpp's; {fmt.name} is written from a folder",
            hint="give the Hugging Face folder that the GGUF was made from",
        )
    checkpoint.require_unquantized()
    require_readable(checkpoint)
    if not fmt.loads_in:
        loaded = ", ".join(f.name for f in tensor_formats() if f.loads_in)
        raise PlanError(f"no program is known to load {fmt.name}", hint=f"formats that are loaded: {loaded}")
    return checkpoint


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _misfit(fmt: type[TensorFormat], shape: tuple[int, ...]) -> str:
    """Why a weight of that shape cannot have the format; empty if it can."""
    try:
        fmt.layout(shape)
    except FormatError as error:
        return error.what
    return ""


def _skipped(weight: str) -> str:
    """The module of a weight that stays as it is, as the configuration names it: experts by what holds them all."""
    return re.sub(r"(\.experts)\.\d+\..*$", r"\1", _module(weight))


def _notes(plan: FolderPlan, misfits: dict[str, str]) -> list[str]:
    """What the user should know: layers that stay, and experts that transformers does not load."""
    out = []
    layers = [name for name in plan.kept if name in misfits or plan.kept[name].startswith("fused")]
    if layers:
        first = next(name for name in layers if name in misfits)
        out.append(f"{len(layers)} linear layers are not quantized; the first, {_module(first)}: {misfits[first]}")
    name, plain = plan.format.name, any(".experts" in module for module in plan.skipped)
    if plan.experts and name not in EXPERTS_LOAD:
        effect = "it stops with an error"
        if name == "NVFP4":
            effect = "it forgets their weight_global_scale and computes wrong numbers"
        elif name.startswith(("GPTQ", "AWQ")):
            effect = "it warns and leaves them random"
        out.append(f"transformers 5.23 does not load experts in {name}: {effect}; other readers may")
    elif plain and name not in PLAIN_EXPERTS_LOAD:
        out.append(f"transformers 5.23 does not load plain experts beside layers in {name}; other readers may")
    return out
