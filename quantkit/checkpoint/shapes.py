"""The shape every tensor must have by config.json, and what a config must say at all."""

from __future__ import annotations

from typing import Any

from quantkit.checkpoint.families import Family, head_dim
from quantkit.errors import CheckpointError

Shape = tuple[int, ...]


def check_config(config: dict[str, Any], family: Family, source: str) -> None:
    """Raise CheckpointError if a hyperparameter is missing, of another type or impossible, or llama.cpp ignores it."""
    hint = "restore the model's own config"
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    moe = any(key.config == "num_experts" for key in family.keys)
    required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] if moe else ["intermediate_size"]
    for name in [*required, "num_key_value_heads", "head_dim", "max_position_embeddings"]:
        value = config.get(name)
        if value is None and name not in required:
            continue
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{source}: {name} is {value!r}, a positive whole number is needed", hint=hint)
    if not isinstance(config.get("rms_norm_eps", 1e-6), int | float):
        raise CheckpointError(f"{source}: rms_norm_eps is {config['rms_norm_eps']!r}, a number is needed", hint=hint)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{source}: hidden_act is {config['hidden_act']!r}", hint="llama.cpp computes silu for this architecture"
        )
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is not None and (not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values())):
            raise CheckpointError(
                f"{source}: {name} differs by layer or is no object", hint="llama.cpp knows one rope for all layers"
            )
        if rope and (rope.get("mscale") or rope.get("mscale_all_dim")):
            raise CheckpointError(f"{source}: {name} has mscale", hint="llama.cpp ignores it for this architecture")
    if head_dim(config) % 2:
        raise CheckpointError(f"{source}: heads of {head_dim(config)} are odd", hint=hint)


def expected_shapes(config: dict[str, Any], family: Family) -> dict[str, Shape]:
    """Shape by the part of a GGUF name after ``blk.N.`` (or the whole name outside the layers)."""
    width, vocabulary, head = config["hidden_size"], config["vocab_size"], head_dim(config)
    q = config["num_attention_heads"] * head
    kv = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    out: dict[str, Shape] = {
        "token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width), "output_norm.weight": (width,),
        "attn_norm.weight": (width,), "ffn_norm.weight": (width,), "attn_q.weight": (q, width), "attn_k.weight": (kv, width),
        "attn_v.weight": (kv, width), "attn_output.weight": (width, q), "attn_q.bias": (q,), "attn_k.bias": (kv,),
        "attn_v.bias": (kv,), "attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,),
    }  # fmt: skip
    ffn = config.get("intermediate_size")
    if ffn:
        out |= {"ffn_gate.weight": (ffn, width), "ffn_up.weight": (ffn, width), "ffn_down.weight": (width, ffn)}
    if family.permutes_qk:  # of the families here only Llama's graph adds these biases
        out |= {"attn_output.bias": (width,), "rope_freqs.weight": (head // 2,)}
        out |= {"ffn_gate.bias": (ffn,), "ffn_up.bias": (ffn,), "ffn_down.bias": (width,)} if ffn else {}
    experts = config.get("num_experts")
    if experts and any(key.config == "num_experts" for key in family.keys):
        inner, shared = config["moe_intermediate_size"], config.get("shared_expert_intermediate_size") or 0
        out |= {
            "ffn_gate_inp.weight": (experts, width), "ffn_gate_exps.weight": (experts, inner, width),
            "ffn_up_exps.weight": (experts, inner, width), "ffn_down_exps.weight": (experts, width, inner),
            "ffn_gate_inp_shexp.weight": (width,), "ffn_gate_shexp.weight": (shared, width),
            "ffn_up_shexp.weight": (shared, width), "ffn_down_shexp.weight": (width, shared),
        }  # fmt: skip
    return out


def check_shapes(shapes: dict[str, Shape], config: dict[str, Any], family: Family, source: str) -> None:
    """Raise CheckpointError for a tensor that is missing, extra or of another shape than config.json says."""
    expected = expected_shapes(config, family)
    layers = config["num_hidden_layers"]
    for name, shape in shapes.items():
        layer, part = split_name(name)
        want = expected.get(part)
        if want is None:
            raise CheckpointError(
                f"{source}: llama.cpp's {family.arch} has no tensor {name}", hint="this variant is not supported"
            )
        if layer is not None and layer >= layers:
            raise CheckpointError(
                f"{source}: {name} is beyond the {layers} layers of config.json", hint="weights and config differ"
            )
        if tuple(n for n in shape if n != 1) != tuple(n for n in want if n != 1):
            raise CheckpointError(
                f"{source}: {name} is {list(shape)}, config.json asks for {list(want)}",
                hint="weights and config.json belong to different models",
            )
    required = {gguf.removeprefix("blk.{i}.") + ".weight" for gguf in family.names.values() if gguf.startswith("blk.")}
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{i}.{part}" for i in range(layers) for part in sorted(required)]
    present = {part for name in shapes for layer, part in [split_name(name)] if layer is not None}
    names += [f"blk.{i}.{part}" for i in range(layers) for part in sorted(present - required)]
    for name in names:
        if name not in shapes:
            raise CheckpointError(
                f"{source} has no tensor {name} ({family.to_hf(name, 0)})", hint="the checkpoint is incomplete; download it again"
            )


def split_name(name: str) -> tuple[int | None, str]:
    """``blk.3.attn_q.weight`` → (3, ``attn_q.weight``); (None, name) outside the layers."""
    if not name.startswith("blk."):
        return None, name
    _, layer, part = name.split(".", 2)
    return int(layer), part
