"""Hugging Face → GGUF: the same logits in transformers, in our torch model and in llama.cpp."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CheckpointError
from quantkit.evaluation.runners import LlamaRunner
from quantkit.modeling.skeleton import materialized_model
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run

IDS = np.array([0, *range(5, 200, 2)], dtype=np.int64)


def need_llama():
    try:
        import llama_cpp
    except ImportError:
        oracle.missing("llama-cpp-python")
    return llama_cpp


def transformers_logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0]


def f32_gguf(checkpoint, path):
    run(checkpoint, uniform_plan(checkpoint, "F32", None), path, force=True)
    return open_checkpoint(path)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_agree_in_every_runtime(name, tiny_folder, tmp_path):
    need_llama()
    folder = tiny_folder(name)
    wanted = transformers_logits(folder)
    assert wanted.std() >= 3
    limit = 1e-3 * float(wanted.std())
    checkpoint = open_checkpoint(folder)
    artifact = f32_gguf(checkpoint, tmp_path / "f32.gguf")
    for source in (checkpoint, artifact):
        with torch.inference_mode():
            ours = materialized_model(source)(torch.from_numpy(IDS)[None]).logits[0]
        assert (ours - wanted).abs().max() <= limit
    runner = LlamaRunner(artifact, 256)
    assert (runner.logits(IDS) - wanted).abs().max() <= limit
    runner.close()


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5500.0}},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    ],
    ids=["eps", "rope base", "heads"],
)
def test_a_wrong_hyperparameter_fails_the_comparison(change, tiny_folder, tmp_path):
    """The logits are large enough that the tolerance above notices."""
    need_llama()
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    wanted = transformers_logits(folder)
    tiny.rewrite_config(folder, **change)
    runner = LlamaRunner(f32_gguf(open_checkpoint(folder), tmp_path / "f32.gguf"), 256)
    assert (runner.logits(IDS) - wanted).abs().max() > 5e-3 * float(wanted.std())
    runner.close()


@pytest.mark.parametrize("model", ["qk-dense-6m", "qk-moe-11m"])
def test_shipped_models_agree_in_llama_cpp(model, tmp_path):
    need_llama()
    folder = tiny.EXAMPLES / model
    wanted = transformers_logits(folder)
    runner = LlamaRunner(f32_gguf(open_checkpoint(folder), tmp_path / "f32.gguf"), 256)
    assert (runner.logits(IDS) - wanted).abs().max() <= 1e-3 * float(wanted.std())
    runner.close()


TEXTS = [
    "Once upon a time, there was a dog.",
    "Hé\t\n\n  12345 don't I'LL 世界 🙂 x",
    "<|endoftext|> special",
    "   spaces   \r\n",
    "a",
]


def models_with_tokenizers():
    shared = oracle.SHARED / "models" / "stories260K"
    return [tiny.DENSE, *([shared] if shared.exists() else [])]


@pytest.mark.parametrize("folder", models_with_tokenizers(), ids=lambda p: p.name)
def test_tokens_agree_with_llama_cpp_and_survive_gguf(folder, tmp_path):
    llama_cpp = need_llama()
    checkpoint = open_checkpoint(folder)
    artifact = f32_gguf(checkpoint, tmp_path / "f32.gguf")
    ours, again = TextEncoder(checkpoint), TextEncoder(artifact)
    theirs = llama_cpp.Llama(str(tmp_path / "f32.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text) == expected
        if "<|" not in text:
            assert again.encode(text) == expected
    assert ours.bos == again.bos == theirs.token_bos()


def test_sentencepiece_without_its_model_file(tmp_path):
    """A tokenizer.json with byte fallback gives the same tokens as tokenizer.model did."""
    llama_cpp = need_llama()
    source = oracle.SHARED / "models" / "stories260K"
    if not source.exists():
        oracle.missing(str(source))
    folder = tmp_path / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    f32_gguf(open_checkpoint(folder), tmp_path / "f32.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "f32.gguf"), vocab_only=True, verbose=False)
    encoder = TextEncoder(open_checkpoint(source))
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == encoder.encode(text)


def test_chat_template_and_special_tokens_are_written():
    metadata = gv.plain(open_checkpoint(tiny.DENSE).metadata())
    assert metadata["tokenizer.chat_template"] == (tiny.DENSE / "chat_template.jinja").read_text()
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_an_unknown_pre_tokenizer_is_refused_unless_named(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="--pre-tokenizer"):
        open_checkpoint(folder).metadata()
    named = gv.plain(open_checkpoint(folder, pre_tokenizer="gpt-2").metadata())
    assert named["tokenizer.ggml.pre"] == "gpt-2"


def test_slices_cover_permuted_and_stacked_tensors(tiny_folder):
    for name, tensor in (("llama", "blk.0.attn_q.weight"), ("qwen2_moe", "blk.0.ffn_gate_exps.weight")):
        checkpoint = open_checkpoint(tiny_folder(name))
        whole = checkpoint.read(tensor)
        total = checkpoint.info(tensor).rows
        pieces = [checkpoint.read_rows(tensor, row, min(row + 5, total)) for row in range(0, total, 5)]
        assert np.array_equal(np.concatenate(pieces).reshape(whole.shape), whole)
