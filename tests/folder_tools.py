"""Small models in bfloat16 whose linear layers fit every format, and how transformers computes with a folder."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.formats.tensors import get_tensor_format
from quantkit.modeling.skeleton import materialized_model
from quantkit.quantizer import folder

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 1}
EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
IDS = torch.arange(3, 35)[None]


def build(name: str, path: Path, **changes: object) -> Path:
    """A tiny model as models are published: bfloat16, with its tokenizer."""
    from safetensors.torch import load_file, save_file

    tiny.build(name, path, **{**SIZES, **(EXPERTS if name == "qwen2_moe" else {}), **changes})
    state = {key: value.bfloat16() for key, value in load_file(path / "model.safetensors").items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    tiny.rewrite_config(path, dtype="bfloat16")
    return path


def write(source: Path, name: str, out: Path, **options):
    """Quantize a folder; returns the manifest."""
    return folder.run(open_checkpoint(source), get_tensor_format(name), out, **options)


def load(path: Path):
    """The model as transformers loads it, with no option but the type."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def decoded(source: Path, out: Path):
    """The unquantized model with the weights that quantkit reads from ``out``, rounded to bfloat16."""
    model = load(source)
    model.load_state_dict({key: value.bfloat16() for key, value in materialized_model(open_checkpoint(out)).state_dict().items()})
    return model


def logits(model) -> torch.Tensor:
    """Logits of a fixed window."""
    with torch.no_grad():
        return model(IDS).logits.float()
