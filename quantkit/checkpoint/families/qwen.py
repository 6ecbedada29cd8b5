"""Qwen2 and Qwen3, dense and mixtures of experts."""

from __future__ import annotations

from quantkit.checkpoint.families.base import (
    ATTENTION,
    DECODER_KEYS,
    DENSE_FFN,
    EXPERT_KEYS,
    EXPERTS,
    OUTER,
    QK_NORM,
    SHARED_EXPERT,
    Config,
    Family,
    Key,
)
from quantkit.errors import CheckpointError


def _refuse_mixed(config: Config) -> None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            "config.json mixes dense and expert layers (mlp_only_layers, decoder_sparse_step)",
            hint="llama.cpp's loader has no such model; quantkit cannot write one",
        )


def _refuse_normalized(config: Config) -> None:
    _refuse_mixed(config)
    if config.get("norm_topk_prob"):
        raise CheckpointError(
            "config.json has norm_topk_prob: true",
            hint="llama.cpp's qwen2moe does not normalize expert weights; the file would compute another function",
        )


def _refuse_unnormalized(config: Config) -> None:
    _refuse_mixed(config)
    if not config.get("norm_topk_prob", False):
        raise CheckpointError(
            "config.json has norm_topk_prob: false",
            hint="llama.cpp's qwen3moe always normalizes expert weights; the file would compute another function",
        )


QWEN2 = Family(
    arch="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    model_type="qwen2",
    names=OUTER | ATTENTION | DENSE_FFN,
)
QWEN3 = Family(
    arch="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    model_type="qwen3",
    names=OUTER | ATTENTION | QK_NORM | DENSE_FFN,
)
QWEN2_MOE = Family(
    arch="qwen2moe",
    hf_classes=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    names=OUTER | ATTENTION | EXPERTS | SHARED_EXPERT,
    keys=DECODER_KEYS + EXPERT_KEYS + (Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),),
    head_required=True,
    config_extra={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    refuse=_refuse_normalized,
)
QWEN3_MOE = Family(
    arch="qwen3moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    names=OUTER | ATTENTION | QK_NORM | EXPERTS,
    keys=DECODER_KEYS + EXPERT_KEYS,
    config_extra={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    refuse=_refuse_unnormalized,
)
