"""Standard mixes: which type llama-quantize gives each tensor.

Rules: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback) of the pinned
version, for the architectures quantkit knows. Tests hold them against llama_model_quantize.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from quantkit.checkpoint.roles import Role
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.plan import Assignment, Plan

BASE = {
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_0": "Q4_0",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0",
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
DOWN = (Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN)


@dataclass
class _State:
    """What llama-quantize keeps while it walks over the tensors."""

    mix: str
    n_layers: int
    n_experts: int
    gqa: int
    is_70b: bool
    has_imatrix: bool
    n_attention_v: int
    seen_v: int = 0
    seen_down: int = 0


def more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth and every third layer between."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def standard_plan(checkpoint: Checkpoint, name: str, stats: ActivationStats | None, use_importance: bool = True) -> Plan:
    """The plan of ``llama-quantize [--imatrix] MODEL NAME``. Raises PlanError for an unknown name."""
    mix = ALIASES.get(name.upper(), name.upper())
    if mix not in BASE:
        raise PlanError(f"unknown standard mix {name!r}", hint=f"known mixes: {', '.join(BASE)}")
    if mix == "Q2_K_S" and (stats is None or not use_importance):
        raise PlanError(
            "standard:Q2_K_S needs activation statistics, as in llama-quantize", hint="run `quantkit analyze` or give --imatrix"
        )
    config = checkpoint.config
    heads = int(config["num_attention_heads"])
    kv = int(config.get("num_key_value_heads") or heads)
    state = _State(
        mix=mix,
        n_layers=checkpoint.n_layers,
        n_experts=int(config.get("num_experts") or 0),
        gqa=heads // kv,
        is_70b=checkpoint.n_layers == 80
        and (checkpoint.family.arch == "qwen2" or (checkpoint.family.arch == "llama" and heads != kv)),
        has_imatrix=stats is not None and use_importance,
        n_attention_v=sum(t.role is Role.ATTN_V for t in checkpoint.tensors.values()),
    )
    formats: dict[str, tuple[str, str]] = {}
    for info in sorted(checkpoint.tensors.values(), key=_walk_order):
        formats[info.name] = _choose(state, checkpoint, info)
    tensors = {t: Assignment(formats[t][0], "ggml", formats[t][1]) for t in checkpoint.tensors}
    plan = Plan(f"standard-{mix}", mix, checkpoint.identity, tensors, use_importance=use_importance, uncovered_as_ones=True)
    if stats is not None and use_importance:
        for name, entry in stats.tensors.items():
            if entry.uncovered and name in tensors:
                words = f"; experts {entry.uncovered} have no statistics and are weighted with ones, as in llama-quantize"
                tensors[name] = replace(tensors[name], reason=tensors[name].reason + words)
    plan.bpw = bits_per_weight(checkpoint, plan)
    plan.file_bytes = planned_bytes(checkpoint, plan, stats)
    return plan


def uniform_plan(checkpoint: Checkpoint, name: str, stats: ActivationStats | None, use_importance: bool = True) -> Plan:
    """Every quantizable tensor in one format; rows that do not fit get llama.cpp's fallback."""
    fmt = get_format(name)
    tensors = {}
    for info in checkpoint.tensors.values():
        if not info.quantizable:
            tensors[info.name] = Assignment("F32", "ggml", "never quantized by llama.cpp")
            continue
        chosen = fallback(fmt.name, info.columns)
        reason = "uniform" if chosen == fmt.name else f"rows of {info.columns} do not fit {fmt.name}"
        tensors[info.name] = Assignment(chosen, "ggml", reason)
    label = ALIASES.get(fmt.name, fmt.name)
    plan = Plan(f"uniform-{fmt.name}", label, checkpoint.identity, tensors, use_importance=use_importance)
    plan.bpw = bits_per_weight(checkpoint, plan)
    plan.file_bytes = planned_bytes(checkpoint, plan, stats)
    return plan


def unquantized_format(info: TensorInfo, checkpoint: Checkpoint) -> str:
    """llama-quantize copies what it does not quantize; from a Hugging Face folder that is F32."""
    return info.dtype if isinstance(checkpoint, GgufCheckpoint) else "F32"


def fallback(name: str, columns: int) -> str:
    """``name``, or what llama.cpp takes when rows are not a multiple of its block."""
    if get_format(name).fits(columns):
        return name
    second = get_format(name).fallback
    return second if second and get_format(second).fits(columns) else "F16"


def _walk_order(info: TensorInfo) -> tuple[int, str]:
    """llama.cpp walks a map sorted by layer, then by name (llama_model_loader, weight_name_comparer)."""
    return (-1 if info.layer is None else info.layer, info.name)


def _choose(state: _State, checkpoint: Checkpoint, info: TensorInfo) -> tuple[str, str]:
    if not info.quantizable:
        return unquantized_format(info, checkpoint), "never quantized by llama.cpp"
    name, reason = BASE[state.mix], f"{state.mix}'s base type"
    picked = _head(state, checkpoint, info) if info.role in (Role.HEAD, Role.EMBEDDING) else _layer(state, info)
    if picked is not None and picked != name:
        name, reason = picked, f"{state.mix} gives {info.role.value} more bits here"
    if picked is not None and picked == name and info.role in (Role.HEAD, Role.EMBEDDING):
        reason = f"{state.mix}'s type for the {info.role.value}"
    chosen = fallback(name, info.columns)
    return chosen, reason if chosen == name else f"rows of {info.columns} do not fit {name}"


def _head(state: _State, checkpoint: Checkpoint, info: TensorInfo) -> str | None:
    base = BASE[state.mix]
    if info.role is Role.EMBEDDING and not checkpoint.tied:
        return None
    if not get_format(base).fits(info.columns):
        return "Q8_0"
    return base if base == "Q8_0" else "Q6_K"


def _layer(state: _State, info: TensorInfo) -> str | None:
    """Type of a tensor inside the layers, None for the mix's base type. Keeps llama.cpp's counters."""
    mix, eight = state.mix, state.n_experts == 8
    if info.role is Role.ATTN_V:
        picked = _attention_v(state)
        state.seen_v += 1
        return picked
    if info.role is Role.ATTN_K:
        return "Q8_0" if eight else None
    if info.role in DOWN:
        layer = (info.layer or 0) if state.n_experts > 1 else state.seen_down
        state.seen_down += 1
        return _ffn_down(state, layer)
    if info.role is Role.ATTN_O:
        if eight:
            return "Q5_K" if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix)
    return None


def _attention_v(state: _State) -> str | None:
    mix, seen = state.mix, state.seen_v
    picked: str | None = None
    if mix == "Q2_K":
        picked = "Q4_K" if state.gqa >= 4 else "Q3_K"
    elif mix == "Q2_K_S" and state.gqa >= 4:
        picked = "Q4_K"
    elif mix == "Q3_K_M":
        picked = "Q5_K" if seen < 2 else "Q4_K"
    elif mix == "Q3_K_L":
        picked = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and more_bits(seen, state.n_attention_v):
        picked = "Q6_K"
    elif mix == "Q4_K_S" and seen < 4:
        picked = "Q5_K"
    if state.is_70b and (picked or BASE[mix]) in ("Q3_K", "Q4_K"):
        picked = "Q5_K"
    return "Q8_0" if state.n_experts == 8 else picked


def _ffn_down(state: _State, layer: int) -> str | None:
    mix, n = state.mix, state.n_layers
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if layer < n // 8 else None
    if mix == "Q3_K_M":
        return "Q5_K" if layer < n // 16 else "Q4_K"
    if mix == "Q3_K_L":
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, n) else None
    if mix == "Q4_K_S":
        return "Q5_K" if layer < n // 8 else None
    if mix == "Q4_0" and state.has_imatrix:
        return "Q4_1" if layer < n // 8 else None
    return None
