"""What a tensor does, told from its GGUF name."""

from __future__ import annotations

import re
from enum import Enum


class Role(str, Enum):
    """The part a tensor plays; policies, plots and plans speak of roles."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_O = "attn_o"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    ROUTER = "router"
    NORM = "norm"
    OTHER = "other"


_BY_STEM = {
    "attn_q": Role.ATTN_Q, "attn_k": Role.ATTN_K, "attn_v": Role.ATTN_V, "attn_output": Role.ATTN_O,
    "ffn_gate": Role.FFN_GATE, "ffn_up": Role.FFN_UP, "ffn_down": Role.FFN_DOWN,
    "ffn_gate_exps": Role.EXPERT_GATE, "ffn_up_exps": Role.EXPERT_UP, "ffn_down_exps": Role.EXPERT_DOWN,
    "ffn_gate_shexp": Role.SHARED_GATE, "ffn_up_shexp": Role.SHARED_UP, "ffn_down_shexp": Role.SHARED_DOWN,
    "ffn_gate_inp": Role.ROUTER, "ffn_gate_inp_shexp": Role.ROUTER,
}  # fmt: skip

SHARED_ROLES = frozenset({Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN})
ATTENTION_ROLES = frozenset({Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_O})


def role_of(name: str) -> Role:
    """Role of a GGUF tensor name (``blk.3.attn_q.weight``). Biases are OTHER."""
    if name == "token_embd.weight":
        return Role.EMBEDDING
    if name == "output.weight":
        return Role.HEAD
    if name.endswith("norm.weight"):
        return Role.NORM
    stem = re.sub(r"^blk\.\d+\.", "", name)
    return _BY_STEM.get(stem.removesuffix(".weight"), Role.OTHER) if stem.endswith(".weight") else Role.OTHER


def layer_of(name: str) -> int | None:
    """Layer number of a GGUF tensor name, None outside the layers."""
    match = re.match(r"^blk\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor: matrices but not norms, routers or anything without rows.

    Rules: llama.cpp, src/llama-quant.cpp, tensor_allows_quantization.
    """
    while shape and shape[0] == 1:  # ggml does not count leading dimensions of one
        shape = shape[1:]
    if len(shape) < 2 or not name.endswith("weight"):
        return False
    return "_norm.weight" not in name and "ffn_gate_inp.weight" not in name
