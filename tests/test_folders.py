"""Folders that quantkit writes: transformers computes with the weights that quantkit decodes, and nothing is left half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import folder_tools as tools
import numpy as np
import pytest
import torch
from tensor_tools import FOUR_BIT, library, same

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.quantization import SCHEMES
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.errors import CheckpointError, FormatError, OutputError, PlanError
from quantkit.formats.tensors import get_tensor_format
from quantkit.quantizer import folder_plan
from quantkit.quantizer.manifest import manifest_path, verify
from quantkit.quantizer.pipeline import run as write_gguf


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tools.build("llama", tmp_path_factory.mktemp("folders") / "dense-BF16")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tools.build("qwen2_moe", tmp_path_factory.mktemp("folders") / "moe")


# ── what transformers makes of them ──


@pytest.mark.parametrize("name", [*SCHEMES, "FP8_BLOCK", *FOUR_BIT])
def test_transformers_computes_with_the_weights_that_quantkit_decodes(name, dense, tmp_path):
    library("compressed_tensors" if name in SCHEMES else "bitsandbytes" if name in FOUR_BIT else "accelerate")
    out = tmp_path / "out"
    manifest = tools.write(dense, name, out)
    assert not manifest.notes and verify(out).ok
    stored = sum(
        get_tensor_format(name).nbytes(info.shape) for info in open_checkpoint(out).tensors.values() if info.dtype == name
    )
    assert 7 * 128 * 128 * get_tensor_format(name).element_bits / 8 < stored < (out / "model.safetensors").stat().st_size
    model, reference = tools.load(out), tools.decoded(dense, out)
    if name not in FOUR_BIT:
        assert torch.equal(tools.logits(model), tools.logits(reference))
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in reference.state_dict().items())
        return
    bnb = library("bitsandbytes.functional")
    quantized = [key for key in reference.state_dict() if key.endswith("proj.weight")]
    assert len(quantized) == 7
    for key in quantized:
        packed = model.get_parameter(key)
        assert same(bnb.dequantize_4bit(packed.data, packed.quant_state) + 0, reference.get_parameter(key).data + 0), key
    # its CPU kernel rounds the maxima to bfloat16 as well
    expected = tools.logits(reference)
    assert (tools.logits(model) - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["W4A16", "FP8_CHANNEL", "MXFP4", "FP8_BLOCK"])
def test_experts_are_quantized_and_routers_are_not(name, moe, tmp_path):
    library("accelerate" if name == "FP8_BLOCK" else "compressed_tensors")
    out = tmp_path / "out"
    assert not tools.write(moe, name, out).notes
    checkpoint = open_checkpoint(out)
    assert checkpoint.info("blk.0.ffn_up_exps.weight").dtype == checkpoint.info("blk.0.ffn_up_shexp.weight").dtype == name
    plain = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "attn_norm.weight", "attn_q.bias")
    assert {checkpoint.info(f"blk.0.{part}").dtype for part in plain} == {"BF16"}
    assert torch.equal(tools.logits(tools.load(out)), tools.logits(tools.decoded(moe, out)))


@pytest.mark.parametrize("name", ["NF4_DQ", "INT8", "NVFP4"])
def test_what_is_said_of_experts_in_transformers_is_true(name, moe, tmp_path):
    library("bitsandbytes" if name in FOUR_BIT else "compressed_tensors")
    out = tmp_path / "out"
    assert "transformers 5.23 does not load experts" in tools.write(moe, name, out).notes[0]
    expected = tools.logits(tools.decoded(moe, out))  # quantkit reads them
    if name == "NVFP4":
        assert (tools.logits(tools.load(out)) - expected).std() > 0.3 * expected.std()
    else:
        with pytest.raises(RuntimeError):
            tools.load(out)


def test_layers_that_do_not_fit_stay_with_those_they_are_fused_with(tmp_path):
    library("accelerate")
    source = tools.build("qwen2_moe", tmp_path / "source", moe_intermediate_size=64, num_key_value_heads=2)
    manifest = tools.write(source, "FP8_BLOCK", tmp_path / "out")
    assert (
        "15 linear layers are not quantized" in manifest.notes[0] and "a row of 64 weights is not a multiple" in manifest.notes[0]
    )
    attention = "model.layers.0.self_attn"
    assert "fused with" in manifest.tensors[f"{attention}.q_proj.weight"]["reason"]
    assert "do not fit" not in manifest.tensors[f"{attention}.o_proj.weight"]["reason"]
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    mlp = "model.layers.0.mlp"
    expected = {f"{attention}.{x}_proj" for x in "qkv"} | {
        f"{mlp}.experts",
        f"{mlp}.gate",
        f"{mlp}.shared_expert_gate",
        "lm_head",
    }
    assert set(skipped) == expected and len(skipped) == len(expected)
    assert torch.equal(tools.logits(tools.load(tmp_path / "out")), tools.logits(tools.decoded(source, tmp_path / "out")))
    assert "plain experts" in tools.write(source, "W4A16", tmp_path / "w4a16").notes[1]
    gptq = tools.write(source, "GPTQ_INT4_G128", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.\d+\.mlp\.experts\..*" in config["dynamic"] and len(gptq.notes) == 2
    assert config["modules_in_block_to_quantize"][0][:2] == ["mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj"]


@pytest.mark.parametrize("name", ["GPTQ_INT4_G128", "GPTQ_INT4_ASYM_G32", "AWQ_INT4_G32"])
def test_gptq_and_awq_folders_are_read_as_they_are_written(name, dense, tmp_path):
    tools.write(dense, name, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4 and config["group_size"] == get_tensor_format(name).group
    assert config.get("sym", True) is not ("ASYM" in name) and config.get("version", "gemm") == "gemm"
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert {n.rpartition(".")[2] for n in file.entries if "down_proj" in n} == {"g_idx", "qweight", "qzeros", "scales"} - (
        {"g_idx"} if "AWQ" in name else set()
    )
    weight = open_checkpoint(dense).read("blk.0.ffn_down.weight")
    expected = get_tensor_format(name).decode(get_tensor_format(name).encode(weight), weight.shape)
    assert same(open_checkpoint(tmp_path / "out").read("blk.0.ffn_down.weight"), expected)


# ── the folder ──


def test_several_files_hold_what_one_holds(dense, tmp_path):
    library("bitsandbytes")
    tools.write(dense, "NF4_DQ", tmp_path / "one")
    manifest = tools.write(dense, "NF4_DQ", tmp_path / "many", shard_bytes=1_200_000, threads=3)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) >= 2
    assert all((tmp_path / "many" / name).stat().st_size <= 1_200_000 for name in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = (
        SafetensorsFile(tmp_path / "one" / "model.safetensors"),
        {n: SafetensorsFile(tmp_path / "many" / n) for n in files},
    )
    assert set(index["weight_map"]) == set(one.entries)
    for name, file in index["weight_map"].items():
        assert same(many[file].read_bits(name), one.read_bits(name))
        assert many[file].entries[name].start % 4 == 0 or one.entries[name].dtype == "U8"
    assert verify(tmp_path / "many").ok and set(manifest.files) >= {*files, "model.safetensors.index.json", "tokenizer.json"}
    assert torch.equal(tools.logits(tools.load(tmp_path / "many")), tools.logits(tools.load(tmp_path / "one")))
    with pytest.raises(PlanError, match="smaller than model.embed_tokens.weight|smaller than lm_head.weight"):
        tools.write(dense, "NF4_DQ", tmp_path / "x", shard_bytes=100_000)


def test_verify_names_what_differs(dense, tmp_path):
    out = tmp_path / "out"
    tools.write(dense, "W4A16", out)
    result = verify(out)
    assert result.ok and not result.unchecked and len(result.checked) == 1
    entry = SafetensorsFile(out / "model.safetensors").entries["model.layers.0.mlp.up_proj.weight_scale"]
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[entry.start + 3] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    (out / "tokenizer.json").unlink()
    (out / "extra.txt").write_text("mine")
    result = verify(out)
    assert not result.ok and "extra.txt" in result.unchecked[0]
    assert "weight model.layers.0.mlp.up_proj.weight differs from the manifest" in result.wrong
    assert "tokenizer.json is missing" in result.wrong and len(result.wrong) == 3
    (out / "model.safetensors").write_bytes(raw[:1000])
    assert any("header" in line for line in verify(out).wrong)
    manifest_path(out).unlink()
    with pytest.raises(CheckpointError, match="did not write this folder"):
        verify(out)


def test_outputs_are_protected(dense, tmp_path):
    out = tmp_path / "out"
    tools.write(dense, "FP8", out)
    with pytest.raises(OutputError, match="--force"):
        tools.write(dense, "INT8", out)
    tools.write(dense, "INT8", out, force=True)
    assert open_checkpoint(out).info("blk.0.attn_q.weight").dtype == "INT8"
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"precious\.txt, which quantkit did not write"):
        tools.write(dense, "FP8", out, force=True)
    (tmp_path / "file").write_text("mine")
    for path, words in ((dense, "own folder"), (dense / "x", "own folder"), (dense.parent, "own folder"), (tmp_path / "file", "is a file"),
                        (tmp_path / "x.gguf", "name for a GGUF"), (tmp_path / "no" / "x", "does not exist")):  # fmt: skip
        with pytest.raises(OutputError, match=words):
            tools.write(dense, "FP8", path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def stop_at(monkeypatch, count: int, how) -> None:
    """Let the codec W4A16 end the run at its ``count``-th weight."""
    real, calls = get_tensor_format("W4A16")._encode, []

    def encode(weight):
        calls.append(1)
        return how() if len(calls) == count else real(weight)

    monkeypatch.setattr(get_tensor_format("W4A16"), "_encode", encode)


def test_an_interrupted_run_leaves_what_was_there(dense, tmp_path, monkeypatch):
    tools.write(dense, "FP8", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()

    def interrupt():
        raise KeyboardInterrupt

    stop_at(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tools.write(dense, "W4A16", tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "config.json").read_bytes() == before
    assert verify(tmp_path / "out").ok


def test_a_folder_that_appears_meanwhile_is_not_replaced(dense, tmp_path, monkeypatch):
    real = get_tensor_format("W4A16")._encode

    def meanwhile(weight):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious.txt").write_text("mine")
        return real(weight)

    monkeypatch.setattr(get_tensor_format("W4A16"), "_encode", meanwhile)
    with pytest.raises(OutputError, match="--force"):
        tools.write(dense, "W4A16", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]


def test_a_killed_run_leaves_nothing_under_the_name(dense, tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import quantkit.formats.tensors.floats8 as codecs
from pathlib import Path
from quantkit.checkpoint import open_checkpoint
from quantkit.quantizer.folder import run
real, calls = codecs.FP8._encode, []
codecs.FP8._encode = lambda w: calls.append(1) or (os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else real(w))
run(open_checkpoint({str(dense)!r}), codecs.FP8, Path({str(tmp_path / "out")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists() and all(path.name.startswith(".out.") for path in tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(dense, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    for name, place in (("model.layers.0.mlp.down_proj.weight", r"\[3, 7\]"), ("model.norm.weight", r"\[0, 7\]"),
                        ("lm_head.weight", r"\[3, 7\]")):  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(dense, folder)
        state = load_file(folder / "model.safetensors")
        state[name].reshape(-1, state[name].shape[-1])[-1 if name == "model.norm.weight" else 3, 7] = float("nan")
        save_file(state, folder / "model.safetensors")
        with pytest.raises(FormatError, match=rf"{name}.*{place} is nan"):
            tools.write(folder, "W4A16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── sources ──


def test_sources_that_cannot_be_used_are_refused_with_the_way_out(dense, tmp_path):
    from quantkit.planning.standard import uniform_plan

    write_gguf(open_checkpoint(dense), uniform_plan(open_checkpoint(dense), "BF16", None), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is a GGUF.* give the Hugging Face folder"):
        tools.write(tmp_path / "x.gguf", "NF4", tmp_path / "out")
    tools.write(dense, "NF4", tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="quantized already .*NF4.* start from the BF16"):
        tools.write(tmp_path / "nf4", "INT8", tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantkit.analyze(tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantkit.quantize(tmp_path / "nf4", tmp_path / "y.gguf", "Q4_K_M")
    with pytest.raises(PlanError, match="no program is known to load FP8_E5M2"):
        tools.write(dense, "FP8_E5M2", tmp_path / "out")
    small = tools.build("qwen3", tmp_path / "small", hidden_size=96, intermediate_size=96, head_dim=24)
    with pytest.raises(PlanError, match="no linear layer fits W4A16; .*row of 96 .*formats that fit it: .*W4A16_G32"):
        tools.write(small, "W4A16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── command line and API ──


def test_containers():
    assert folder_plan.folder_format("uniform:nf4", None) is get_tensor_format("NF4")
    assert folder_plan.folder_format("uniform:MXFP4", None) is folder_plan.folder_format("uniform:MXFP4", "gguf") is None
    assert folder_plan.folder_format("uniform:MXFP4", "safetensors") is get_tensor_format("MXFP4")
    for plan in ("uniform:Q4_K", "dynamic", "Q4_K_M", "plan.json"):
        assert folder_plan.folder_format(plan, None) is None
        with pytest.raises(PlanError, match="--container safetensors takes no"):
            folder_plan.folder_format(plan, "safetensors")
    with pytest.raises(PlanError, match="NF4 is no format of GGUF"):
        folder_plan.folder_format("uniform:NF4", "gguf")


def test_the_command_line(dense, tmp_path, monkeypatch):
    from test_cli import quantkit as command

    monkeypatch.chdir(tmp_path)
    result = command("quantize", dense, "--plan", "uniform:NF4_DQ")
    assert result.output.startswith("dense-NF4_DQ: ") and "uniform-NF4_DQ" in result.output
    assert "as written" in command("verify", "dense-NF4_DQ/").output
    rows = json.loads(command("inspect", "dense-NF4_DQ", "--json").output)["tensors"]
    head, query = (next(row for row in rows if row["name"] == name) for name in ("output.weight", "blk.0.attn_q.weight"))
    assert (head["type"], head["why"], head["bytes"]) == ("BF16", "never quantized (head)", 2 * 4096 * 128)
    assert (query["type"], query["why"], query["bytes"]) == ("NF4_DQ", "uniform", get_tensor_format("NF4_DQ").nbytes((128, 128)))
    out = json.loads(
        command("quantize", dense, "--plan", "uniform:MXFP4", "--container", "safetensors", "-o", "mx/", "--json").output
    )
    assert out["output"] == "mx" and out["files"]["model.safetensors"]["bytes"] == os.path.getsize("mx/model.safetensors")
    report = command("compare", dense, "dense-NF4_DQ", "mx", "--limit", "256", "--window", "64", "-o", "r.html", "--json").output
    candidates = json.loads(report)["candidates"]
    assert all(0 < c["divergence"]["mean_kld"] < 3 and 13 < c["bpw"] < 15 for c in candidates), candidates
    assert candidates[0]["plan"]["blk.0.attn_q.weight"] == "NF4_DQ"
    for arguments, words in (
        (["--plan", "uniform:NF4_DQ"], "--force"), (["--plan", "uniform:NF4", "--bpw", "4"], "has its own size"),
        (["--plan", "uniform:NF4", "--imatrix", "x"], "without activation statistics"),
        (["--plan", "uniform:NF4", "--container", "gguf"], "no format of GGUF"),
    ):  # fmt: skip
        assert words in command("quantize", dense, *arguments, ok=False).stderr
    assert "use --runtime torch" in command("compare", dense, "mx", "--runtime", "llama", ok=False).stderr


def test_loading_keeps_the_weights_packed_and_gives_what_they_decode_to(dense, tmp_path):
    path, manifest = quantkit.quantize(dense, tmp_path / "out", "uniform:AWQ_INT4_G32", split_bytes=2 << 20)
    assert path == tmp_path / "out" and len(manifest.files) > 3
    model, fmt = quantkit.load(path), get_tensor_format("AWQ_INT4_G32")
    weight = quantkit.load(dense).state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy()
    expected = fmt.decode(fmt.encode(weight), weight.shape)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.formats == {"weight": "UINT4_F16_32"} and np.array_equal(layer.dequantized().numpy(), expected)
