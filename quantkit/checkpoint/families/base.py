"""What a family of architectures tells the rest: names, metadata and how rows are ordered."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quantkit.checkpoint import gguf_values as gv
from quantkit.errors import CheckpointError

Config = dict[str, Any]

# Hugging Face name → GGUF name. {i} is the layer, {e} the expert; the weight or bias suffix is kept.
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION = {
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
}
QK_NORM = {
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
}
DENSE_FFN = {
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}
EXPERTS = {
    "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "blk.{i}.ffn_gate_exps",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "blk.{i}.ffn_up_exps",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "blk.{i}.ffn_down_exps",
}
SHARED_EXPERT = {
    "model.layers.{i}.mlp.shared_expert_gate": "blk.{i}.ffn_gate_inp_shexp",
    "model.layers.{i}.mlp.shared_expert.gate_proj": "blk.{i}.ffn_gate_shexp",
    "model.layers.{i}.mlp.shared_expert.up_proj": "blk.{i}.ffn_up_shexp",
    "model.layers.{i}.mlp.shared_expert.down_proj": "blk.{i}.ffn_down_shexp",
}


@dataclass(frozen=True)
class Key:
    """One hyperparameter: where it lies in GGUF (after ``<arch>.``) and in config.json."""

    gguf: str
    config: str
    kind: int = gv.U32
    default: Callable[[Config], Any] | None = None


def _rope_theta(config: Config) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def head_dim(config: Config) -> int:
    """Size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


DECODER_KEYS = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", default=lambda c: c["num_attention_heads"]),
    Key("rope.freq_base", "rope_theta", gv.F32, default=_rope_theta),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", gv.F32, default=lambda c: 1e-6),
    Key("vocab_size", "vocab_size"),
    Key("rope.dimension_count", "rope_dimension", default=head_dim),
    Key("attention.key_length", "head_dim", default=head_dim),
    Key("attention.value_length", "head_dim", default=head_dim),
)
EXPERT_KEYS = (
    Key("expert_count", "num_experts", default=lambda c: c.get("num_local_experts")),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
)


@dataclass(frozen=True)
class Family:
    """One architecture: how Hugging Face and llama.cpp name and order its parts."""

    arch: str
    hf_classes: tuple[str, ...]
    model_type: str
    names: dict[str, str]
    keys: tuple[Key, ...] = DECODER_KEYS
    permutes_qk: bool = False
    rope_freqs: bool = False
    head_required: bool = False
    config_extra: dict[str, Any] = field(default_factory=dict)
    refuse: Callable[[Config], None] | None = None

    def to_gguf(self, hf_name: str) -> tuple[str, int | None] | None:
        """GGUF name and expert number of a Hugging Face tensor, None if it is not part of the family."""
        stem, _, suffix = hf_name.rpartition(".")
        layer = re.search(r"\.layers\.(\d+)\.", stem)
        expert = re.search(r"\.experts\.(\d+)\.", stem)
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.{i}.", stem)
        pattern = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", pattern)
        target = self.names.get(pattern)
        if target is None or suffix not in ("weight", "bias"):
            return None
        name = target.format(i=layer.group(1) if layer else "")
        return f"{name}.{suffix}", int(expert.group(1)) if expert else None

    def to_hf(self, gguf_name: str, expert: int | None = None) -> str | None:
        """Hugging Face name of a GGUF tensor (of one expert if it is stacked), None if unknown."""
        stem, _, suffix = gguf_name.rpartition(".")
        layer = re.match(r"^blk\.(\d+)\.", stem)
        pattern = re.sub(r"^blk\.\d+\.", "blk.{i}.", stem)
        for hf, gguf in self.names.items():
            if gguf == pattern:
                return f"{hf.format(i=layer.group(1) if layer else '', e=expert)}.{suffix}"
        return None

    def metadata(self, config: Config) -> gv.Metadata:
        """Hyperparameters of a config.json as GGUF metadata."""
        if self.refuse:
            self.refuse(config)
        out: gv.Metadata = {}
        for key in self.keys:
            value = config.get(key.config)
            if value is None and key.default is not None:
                value = key.default(config)
            if value is None:
                raise CheckpointError(f"config.json has no {key.config}", hint="restore the model's own config.json")
            out[f"{self.arch}.{key.gguf}"] = gv.Value(key.kind, float(value) if key.kind == gv.F32 else int(value))
        out.update(self._rope_scaling(config))
        return out

    def _rope_scaling(self, config: Config) -> gv.Metadata:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        prefix = f"{self.arch}.rope.scaling"
        if kind == "llama3" and not self.rope_freqs:
            raise CheckpointError(
                f"config.json asks for rope scaling llama3 in a {self.arch} model", hint="llama.cpp reads it for Llama only"
            )
        if kind in ("default", "dynamic", "llama3"):  # llama3 becomes the tensor rope_freqs.weight
            return {}
        out = {f"{prefix}.type": gv.string(kind), f"{prefix}.factor": gv.f32(rope.get("factor", 1.0))}
        if kind == "linear":
            return out
        if kind == "yarn":
            if "original_max_position_embeddings" in rope:
                out[f"{prefix}.original_context_length"] = gv.u32(rope["original_max_position_embeddings"])
            if (rope.get("beta_fast") or 32) != 32 or (rope.get("beta_slow") or 1) != 1:
                raise CheckpointError(
                    "config.json sets yarn's beta_fast or beta_slow",
                    hint="llama.cpp uses 32 and 1; the file would compute another function",
                )
            if rope.get("attention_factor"):  # llama.cpp multiplies its own 1 + 0.1·ln(factor) in
                own = 1.0 + 0.1 * math.log(rope.get("factor", 1.0))
                out[f"{prefix}.attn_factor"] = gv.f32(rope["attention_factor"] / own)
            return out
        raise CheckpointError(
            f"config.json asks for rope scaling {kind!r}", hint="quantkit writes default, linear, yarn and llama3"
        )

    def config(self, metadata: dict[str, Any]) -> Config:
        """A config.json equivalent to GGUF metadata (plain values), for building the model in torch."""
        out: Config = {"architectures": [self.hf_classes[0]], "model_type": self.model_type, "hidden_act": "silu"}
        out.update(self.config_extra)
        for key in self.keys:
            value = metadata.get(f"{self.arch}.{key.gguf}")
            if value is not None:
                out[key.config] = value
        if "vocab_size" not in out:
            out["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
        out.setdefault("head_dim", head_dim(out))
        out.pop("rope_dimension", None)
        theta = out.pop("rope_theta", 10000.0)
        out["rope_parameters"] = {"rope_theta": theta, **self._rope_from(metadata)}
        for token, field_name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
            out[field_name] = metadata.get(f"tokenizer.ggml.{token}_token_id")
        return out

    def _rope_from(self, metadata: dict[str, Any]) -> dict[str, Any]:
        prefix = f"{self.arch}.rope.scaling"
        kind = metadata.get(f"{prefix}.type", "none")
        if kind in ("none", "default"):
            return {"rope_type": "default"}
        out = {"rope_type": kind, "factor": metadata.get(f"{prefix}.factor", 1.0)}
        if f"{prefix}.original_context_length" in metadata:
            out["original_max_position_embeddings"] = metadata[f"{prefix}.original_context_length"]
        if f"{prefix}.attn_factor" in metadata:
            out["attention_factor"] = metadata[f"{prefix}.attn_factor"] * (1.0 + 0.1 * math.log(out["factor"]))
        return out
