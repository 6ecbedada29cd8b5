"""Tiny models built on the spot, one for each architecture, with logits large enough to show mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"
DENSE, MOE = EXAMPLES / "qk-dense-6m", EXAMPLES / "qk-moe-11m"

COMMON = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
ARCHITECTURES: dict[str, dict] = {
    "llama": {"attention_bias": True},
    "llama-rope3": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "tie_word_embeddings": True,
    },
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    "qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                                                  "original_max_position_embeddings": 64}},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
}  # fmt: skip


def build(name: str, folder: Path, **changes: object) -> Path:
    """Save a tiny model of an architecture with the tokenizer of the shipped model; returns the folder."""
    torch.manual_seed(7)
    kind = name.split("-")[0]
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **ARCHITECTURES[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scale_up(model)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DENSE / file, folder / file)
    return folder


def scale_up(model: torch.nn.Module) -> None:
    """Draw weights so that attention, norms, biases and routers all matter and std(logits) ≥ 3."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        ids = torch.arange(3, 67)[None]
        for _ in range(20):
            if model(ids).logits.std() >= 3:
                return
            (model.lm_head if not model.config.tie_word_embeddings else model.model.norm).weight.mul_(1.5)
    raise AssertionError("the logits stay small")


def rewrite_config(folder: Path, **changes: object) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
