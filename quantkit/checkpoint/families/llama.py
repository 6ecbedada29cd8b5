"""Llama and Mistral: llama.cpp rotates pairs of neighbours, so rows of q and k are permuted."""

from __future__ import annotations

from quantkit.checkpoint.families.base import ATTENTION, DENSE_FFN, OUTER, Config, Family
from quantkit.errors import CheckpointError


def _refuse(config: Config) -> None:
    if config.get("num_local_experts"):
        raise CheckpointError("config.json describes Mixtral experts", hint="quantkit does not support Mixtral yet")


LLAMA = Family(
    arch="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    model_type="llama",
    names=OUTER | ATTENTION | DENSE_FFN,
    permutes_qk=True,
    rope_freqs=True,
    refuse=_refuse,
)
