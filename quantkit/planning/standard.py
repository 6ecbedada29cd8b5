"""Standard mixes: which type llama-quantize gives each tensor.

Rules: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback, tensor_requires_imatrix)
of the pinned version, for the architectures quantkit knows. Tests hold them against llama_model_quantize.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from quantkit.checkpoint.roles import Role
from quantkit.encoders import default_method
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.plan import Assignment, Plan

# Mix → the type of what no rule names. The types of IQ2_S, IQ2_M and IQ3_XS are llama.cpp's, not misprints.
BASE = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL",
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q8_0": "Q8_0", "MXFP4_MOE": "Q8_0", "Q1_0": "Q1_0", "Q2_0": "Q2_0", "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0",
    "F16": "F16", "BF16": "BF16", "F32": "F32",
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NEXT_WITHOUT = {"IQ1_S": "IQ1_M", "IQ2_XXS": "IQ2_S", "IQ2_XS": "IQ2_S"}  # the next finer type that needs no statistics
LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # the rules for all mixes do not hold for these
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")  # types; Q2_K too, in Q2_K_S

KINDS = {  # what llama.cpp takes together
    Role.FFN_GATE: Role.FFN_UP, Role.EXPERT_GATE: Role.FFN_UP, Role.SHARED_GATE: Role.FFN_UP, Role.EXPERT_UP: Role.FFN_UP,
    Role.SHARED_UP: Role.FFN_UP, Role.EXPERT_DOWN: Role.FFN_DOWN, Role.SHARED_DOWN: Role.FFN_DOWN,
}  # fmt: skip

# Kind → mixes → rules. A rule is a type and the facts (see _facts) that must all hold; the first rule that holds wins.
RULES: dict[Role, dict[str, tuple[tuple[str, ...], ...]]] = {
    Role.EMBEDDING: {  # one that is not the head as well
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS": (("Q2_K",),),
        "IQ2_S IQ2_M IQ3_XXS": (("IQ3_S",),),
        "TQ1_0 TQ2_0 Q2_0": (("Q4_K",),),
    },
    Role.ATTN_Q: {
        "IQ3_XXS": (("IQ2_S",),),
        "IQ3_XS": (("IQ3_XXS",),),
    },
    Role.ATTN_K: {
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M": (("Q4_K", "eight experts"),),
        "IQ3_XXS": (("IQ2_S",),),
        "IQ3_XS": (("IQ3_XXS",),),
    },
    Role.ATTN_V: {
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS": (("Q4_K", "few value heads or experts"), ("Q2_K",)),
        "IQ2_S IQ2_M": (("Q4_K", "few value heads or experts"), ("IQ3_S",)),
        "IQ3_XXS": (("Q4_K", "few value heads"), ("IQ3_S", "no imatrix")),
        "IQ3_XS IQ3_S Q2_K_S": (("Q4_K", "few value heads"),),
        "IQ3_M": (("Q4_K",),),
        "IQ4_XS IQ4_NL": (("Q5_K", "few value heads"),),
        "Q2_K": (("Q4_K", "few value heads"), ("Q3_K",)),
        "Q3_K_M": (("Q5_K", "first two"), ("Q4_K",)),
        "Q3_K_L": (("Q5_K",),),
        "Q4_K_S": (("Q5_K", "first four"),),
        "Q4_K_M Q5_K_M": (("Q6_K", "more bits"),),
    },
    Role.ATTN_O: {
        "IQ1_S IQ1_M": (("Q5_K", "eight experts"), ("IQ2_XXS",)),
        "IQ2_XXS IQ2_XS": (("Q5_K", "eight experts"),),
        "IQ2_S IQ2_M IQ3_XXS": (("Q5_K", "eight experts"), ("IQ3_S",)),
        "IQ3_XS IQ3_S IQ4_XS IQ4_NL Q3_K_S Q4_K_S Q4_K_M": (("Q5_K", "eight experts"),),
        "IQ3_M Q3_K_M": (("Q5_K", "eight experts"), ("Q4_K",)),
        "Q2_K": (("Q5_K", "eight experts"), ("Q3_K",)),
        "Q3_K_L": (("Q3_K", "eight experts"), ("Q5_K",)),
    },
    Role.FFN_UP: {
        "IQ3_XS": (("IQ3_XXS", "middle"),),
    },
    Role.FFN_DOWN: {
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS": (("Q2_K", "first eighth"),),
        "IQ2_S IQ2_M": (("IQ3_S", "first eighth"),),
        "IQ3_XXS": (("Q4_K", "no imatrix", "first eighth"), ("Q3_K", "no imatrix")),
        "IQ3_M": (("Q4_K", "first eighth"), ("Q4_K", "eight experts", "more bits")),
        "IQ4_XS IQ4_NL": (("Q5_K", "no imatrix", "first eighth"),),
        "Q2_K": (("Q3_K",),),
        "Q2_K_S": (("Q4_K", "first eighth"),),
        "Q3_K_M": (("Q5_K", "first sixteenth"), ("Q4_K",)),
        "Q3_K_L": (("Q5_K",),),
        "Q4_K_S": (("Q5_K", "first eighth"),),
        "Q4_K_M Q5_K_M": (("Q6_K", "more bits"),),
        "Q4_0": (("Q4_1", "imatrix", "first eighth"),),
        "Q5_0": (("Q5_1", "imatrix", "first eighth"),),
    },
}


@dataclass(frozen=True)
class _Model:
    """What the rules ask about a model. ``downs``: its ffn_down tensors in the order of llama-quantize's walk."""

    layers: int
    experts: int
    gqa: int
    is_70b: bool
    tied: bool
    has_imatrix: bool
    downs: tuple[str, ...]


def standard_plan(checkpoint: Checkpoint, name: str, stats: ActivationStats | None, use_importance: bool = True) -> Plan:
    """The plan of ``llama-quantize [--imatrix] MODEL NAME``.

    Raises PlanError for an unknown name, and where llama-quantize would refuse: a type needs statistics that are
    not there, or has no replacement for rows that do not fit it.
    """
    mix = ALIASES.get(name.upper(), name.upper())
    if mix not in BASE:
        raise PlanError(f"unknown standard mix {name!r}", hint=f"known mixes: {', '.join(BASE)}")
    stats = stats.routed() if use_importance and stats is not None else None  # llama-quantize knows nothing borrowed
    walk = sorted(checkpoint.tensors.values(), key=_walk_order)
    model = _model(checkpoint, walk, stats is not None)
    chosen: dict[str, Assignment] = {}
    for info in walk:
        chosen[info.name] = _choose(model, mix, checkpoint, info)
        _require_importance(stats, mix, info, chosen[info.name].format)
    tensors = {t: chosen[t] for t in checkpoint.tensors}
    plan = Plan(f"standard-{mix}", mix, checkpoint.identity, tensors, use_importance=use_importance, uncovered_as_ones=True)
    for name, measured in stats.tensors.items() if stats is not None else ():
        if measured.uncovered and name in tensors:
            words = f"; experts {measured.uncovered} have no statistics and are weighted with ones, as in llama-quantize"
            tensors[name] = replace(tensors[name], reason=tensors[name].reason + words)
    plan.bpw = bits_per_weight(checkpoint, plan)
    plan.file_bytes = planned_bytes(checkpoint, plan, stats)
    return plan


def uniform_plan(checkpoint: Checkpoint, name: str, stats: ActivationStats | None, use_importance: bool = True) -> Plan:
    """Every quantizable tensor in one format; rows that do not fit get llama.cpp's fallback."""
    fmt = get_format(name)
    used = stats if use_importance else None
    tensors = {}
    for info in checkpoint.tensors.values():
        if not info.quantizable:
            tensors[info.name] = Assignment("F32", "ggml", "never quantized by llama.cpp")
            continue
        chosen = fallback(fmt.name, info.columns)
        reason = "uniform" if chosen == fmt.name else f"rows of {info.columns} do not fit {fmt.name}"
        if get_format(chosen).needs_importance and not (used and used.covers(info.name)):
            reason = f"{chosen} needs activation statistics, which this tensor (or an expert of it) does not have"
            chosen = NEXT_WITHOUT[chosen]
        tensors[info.name] = Assignment(chosen, default_method(get_format(chosen)), reason)
    label = ALIASES.get(fmt.name, fmt.name)
    plan = Plan(f"uniform-{fmt.name}", label, checkpoint.identity, tensors, use_importance=use_importance)
    plan.bpw = bits_per_weight(checkpoint, plan)
    plan.file_bytes = planned_bytes(checkpoint, plan, stats)
    return plan


def unquantized_format(info: TensorInfo, checkpoint: Checkpoint) -> str:
    """llama-quantize copies what it does not quantize; from a Hugging Face folder that is F32."""
    return info.dtype if isinstance(checkpoint.opened, GgufCheckpoint) else "F32"


def fallback(name: str, columns: int) -> str:
    """``name``, or what llama.cpp takes when rows are not a multiple of its block."""
    if get_format(name).fits(columns):
        return name
    second = get_format(name).fallback
    return second if second and get_format(second).fits(columns) else "F16"


def _walk_order(info: TensorInfo) -> tuple[int, str]:
    """llama.cpp walks a map sorted by layer, then by name (llama_model_loader, weight_name_comparer)."""
    return (-1 if info.layer is None else info.layer, info.name)


def _model(checkpoint: Checkpoint, walk: list[TensorInfo], has_imatrix: bool) -> _Model:
    heads = int(checkpoint.config["num_attention_heads"])
    kv = int(checkpoint.config.get("num_key_value_heads") or heads)
    arch, layers = checkpoint.family.arch, checkpoint.n_layers
    return _Model(
        layers=layers,
        experts=max(info.experts for info in walk),
        gqa=heads // kv,
        is_70b=layers == 80 and (arch == "qwen2" or (arch == "llama" and heads != kv)),
        tied=checkpoint.tied,
        has_imatrix=has_imatrix,
        downs=tuple(info.name for info in walk if KINDS.get(info.role, info.role) is Role.FFN_DOWN),
    )


def _facts(model: _Model, layer: int) -> dict[str, bool]:
    """The words of RULES for one tensor."""
    n = model.layers
    middle = n // 8 <= layer < 7 * n // 8
    return {
        "imatrix": model.has_imatrix,
        "no imatrix": not model.has_imatrix,
        "eight experts": model.experts == 8,
        "few value heads": model.gqa >= 4,
        "few value heads or experts": model.gqa >= 4 or model.experts >= 4,
        "first two": layer < 2,
        "first four": layer < 4,
        "first eighth": layer < n // 8,
        "first sixteenth": layer < n // 16,
        "middle": middle,
        "more bits": not middle or (layer - n // 8) % 3 == 2,
    }


def _choose(model: _Model, mix: str, checkpoint: Checkpoint, info: TensorInfo) -> Assignment:
    if not info.quantizable:
        return Assignment(unquantized_format(info, checkpoint), "ggml", "never quantized by llama.cpp")
    base, name = get_format(BASE[mix]), _pick(model, mix, info)
    if info.role in (Role.HEAD, Role.EMBEDDING):
        reason = f"{mix}'s type for the {info.role.value}"
    elif name == base.name:
        reason = f"{mix}'s base type"
    else:
        reason = f"{mix} gives {info.role.value} {'more' if get_format(name).bpw() > base.bpw() else 'fewer'} bits here"
    fmt, columns = get_format(name), info.columns
    if fmt.fits(columns):
        return Assignment(name, "ggml", reason)
    if fmt.elements > 32 and fmt.fallback is None:
        raise PlanError(
            f"{info.name} has rows of {columns}, which do not fit {name}, and llama-quantize has no replacement",
            hint=f"another mix, or --plan uniform:{name}, which writes such tensors in F16",
        )
    return Assignment(fallback(name, columns), "ggml", f"rows of {columns} do not fit {name}")


def _pick(model: _Model, mix: str, info: TensorInfo) -> str:
    """The type by llama.cpp's rules, before rows are looked at."""
    base, kind = BASE[mix], KINDS.get(info.role, info.role)
    if not get_format(base).is_quantized():
        return base
    if kind is Role.HEAD or (kind is Role.EMBEDDING and model.tied):
        if base == "Q8_0" or not get_format(base).fits(info.columns):
            return "Q8_0"
        return "Q5_K" if mix in (*LOW, "IQ3_XXS") else "Q6_K"
    if mix == "MXFP4_MOE":
        return "MXFP4" if info.experts > 1 else base
    # For the low mixes llama.cpp counts tensors instead of layers: shared experts count too.
    counted = mix in LOW and kind is Role.FFN_DOWN
    facts = _facts(model, model.downs.index(info.name) if counted else info.layer or 0)
    rules = next((rules for mixes, rules in RULES.get(kind, {}).items() if mix in mixes.split()), ())
    picked = next((name for name, *needed in rules if all(facts[word] for word in needed)), base)
    if mix not in LOW and model.experts == 8 and kind in (Role.ATTN_K, Role.ATTN_V):
        return "Q8_0"
    if mix not in LOW and model.is_70b and kind is Role.ATTN_V and picked in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return picked


def _require_importance(stats: ActivationStats | None, mix: str, info: TensorInfo, name: str) -> None:
    """Raise PlanError where llama-quantize refuses a type without importance; it exempts embedding and head."""
    needed = name in NEED_IMPORTANCE or (mix == "Q2_K_S" and name == "Q2_K")
    if not needed or not info.quantizable or info.role in (Role.HEAD, Role.EMBEDDING):
        return
    if stats is None:
        raise PlanError(
            f"standard:{mix} needs activation statistics, as in llama-quantize: {info.name} becomes {name}",
            hint="run `quantkit analyze` or give --imatrix",
        )
    if info.name not in stats.tensors:
        raise PlanError(
            f"standard:{mix} makes {info.name} {name}, which needs activation statistics, and those given have none for it",
            hint="run `quantkit analyze` on this model, or give a complete --imatrix",
        )
