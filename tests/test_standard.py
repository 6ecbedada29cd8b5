"""Standard mixes: the types of llama_model_quantize, and the bytes of the oracle."""

from __future__ import annotations

import ctypes
import re
import subprocess

import numpy as np
import oracle
import pytest
import tiny

from quantkit.analysis.imatrix import read_imatrix, write_imatrix
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.families import family_of_gguf
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, file_bytes, header_bytes
from quantkit.checkpoint.shapes import expected_shapes, split_name
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.planning.artifact import FILE_TYPES
from quantkit.planning.standard import ALIASES, BASE, RULES, standard_plan, uniform_plan
from quantkit.quantizer.pipeline import run

MODELS = ["dense", "moe", "llama", "qwen2_moe"]
WRITTEN = [  # the mixes whose bytes are compared too; each format's encoder has its own tests
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16",
]  # fmt: skip
# Headers without weights, for the rules that only larger models meet. Families: llama, qwen2, qwen3, qwen2moe, qwen3moe.
SKETCHES = {
    "llama-70b": ("llama", {"num_hidden_layers": 80, "num_key_value_heads": 1}),
    "llama-65b": ("llama", {"num_hidden_layers": 80}),
    "qwen2-80": ("qwen2", {"num_hidden_layers": 80, "intermediate_size": 320}),
    "qwen3-tied": ("qwen3", {"num_hidden_layers": 37, "num_key_value_heads": 2, "tied": True}),
    "narrow": ("llama", {"num_hidden_layers": 9, "hidden_size": 128, "tied": True}),
    "two-experts": ("qwen3moe", {"num_hidden_layers": 16, "num_experts": 2, "num_key_value_heads": 4}),
    "four-experts": ("qwen2moe", {"num_hidden_layers": 33, "num_experts": 4, "intermediate_size": 512}),
    "eight-experts": ("qwen2moe", {"num_hidden_layers": 26, "num_experts": 8}),
    "eight-grouped": ("qwen3moe", {"num_hidden_layers": 32, "num_experts": 8, "num_key_value_heads": 2, "tied": True}),
}  # fmt: skip


def folder_of(name, tiny_folder):
    return {"dense": tiny.DENSE, "moe": tiny.MOE}.get(name) or tiny_folder(name)


def fake_stats(checkpoint) -> ActivationStats:
    """Deterministic statistics for every layer tensor that llama-imatrix would have."""
    rng = np.random.default_rng(11)
    stats = ActivationStats(datasets=("fake.txt",), chunks=4)
    for info in checkpoint.tensors.values():
        if info.quantizable and info.layer is not None:
            counts = np.full(info.experts, 2048.0, np.float32)
            stats.tensors[info.name] = TensorStats(rng.gamma(0.7, 900.0, (info.experts, info.columns)).astype(np.float32), counts)
    return stats


def llama_quantize(source, target, mix, stats, dry_run=False):
    """llama_model_quantize through llama-cpp-python, with our statistics as its imatrix; whether it succeeded."""
    llama_cpp = pytest.importorskip("llama_cpp") if not oracle.REQUIRED else __import__("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = FILE_TYPES[mix], 2, dry_run
    keep = []
    if stats is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(stats.tensors) + 1))()
        for slot, (name, entry) in zip(entries, stats.tensors.items(), strict=False):
            mean = (entry.sum_squares / entry.counts[:, None]).astype(np.float32)
            keep.append(mean)
            slot.name, slot.size = name.encode(), mean.size
            slot.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix)) if hasattr(params, "imatrix") else None
        keep.append(entries)
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


def announced(source, mix, stats):
    """(types by tensor, whether they need an imatrix) of llama-quantize --dry-run; None for the types if it fails."""
    llama_cpp = pytest.importorskip("llama_cpp") if not oracle.REQUIRED else __import__("llama_cpp")
    lines = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    llama_cpp.llama_log_set(listen, None)
    try:
        done = llama_quantize(source, "unused", mix, stats, dry_run=True)
    finally:
        llama_cpp.llama_log_set(callback, data)
    text = "".join(lines)
    found = re.findall(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = .*?(?:\((\w+)\))?$", text, re.MULTILINE)
    types = {name: (new or old).upper() for name, old, new in found}
    return types if done else None, "will require an imatrix" in text


def sketch(path, arch, metadata, tied=False, **config):
    """A GGUF file of the right size with nothing in it."""
    family = family_of_gguf(arch)
    config = {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": len(gv.plain(metadata)["tokenizer.ggml.tokens"]),
        "max_position_embeddings": 512, "num_experts_per_tok": 2, "norm_topk_prob": arch == "qwen3moe",
        "rms_norm_eps": 1e-5, **config,
    }  # fmt: skip
    shapes = expected_shapes(config, family)
    names = [f"{name}.weight" for name in family.names.values() if not (tied and name == "output")]
    full = [name.format(i=i) for name in names for i in range(config["num_hidden_layers"] if "{i}" in name else 1)]
    specs = [TensorSpec(name, shapes[split_name(name)[1]], get_format("F32")) for name in full]
    general = {key: value for key, value in metadata.items() if key.startswith(("general.", "tokenizer."))}
    metadata = {**general, "general.architecture": gv.string(arch), **family.metadata(config)}
    with open(path, "wb") as handle:
        handle.write(header_bytes(metadata, specs))
        handle.truncate(file_bytes(metadata, specs))
    return path


@pytest.fixture(scope="module")
def sources(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard")
    out = {}
    for name in MODELS:
        checkpoint = open_checkpoint(folder_of(name, tiny_folder))
        out[name] = (checkpoint, folder / f"{name}.gguf", fake_stats(checkpoint))
        run(checkpoint, uniform_plan(checkpoint, "F32", None), out[name][1])
    return out


@pytest.mark.parametrize("mix", WRITTEN)
@pytest.mark.parametrize("name", MODELS)
def test_types_and_bytes_equal_llama_quantize(name, mix, sources, tmp_path):
    checkpoint, source, stats = sources[name]
    for given in [stats] if mix == "Q2_K_S" else [None, stats]:
        assert llama_quantize(source, tmp_path / "theirs.gguf", mix, given)
        plan = standard_plan(checkpoint, mix, given)
        run(checkpoint, plan, tmp_path / "ours.gguf", stats=given, force=True)
        ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
        types = {n: e.format.name for n, e in ours.entries.items()}
        assert types == {n: e.format.name for n, e in theirs.entries.items()}
        lib = oracle.library()
        for info in list(checkpoint.tensors.values())[::7]:
            entry = ours.entries[info.name]
            if not entry.format.is_quantized():
                continue
            weights = checkpoint.read(info.name).reshape(info.experts, -1, info.columns)
            expected = [
                oracle.encode(
                    lib,
                    entry.gguf_id,
                    entry.format.row_bytes(info.columns),
                    weights[e],
                    given.importance(info.name, e) if given else None,
                )
                for e in range(info.experts)
            ]
            assert np.array_equal(ours.read_packed(info.name, 0, info.rows), np.concatenate(expected)), info.name


@pytest.mark.parametrize("name", [*MODELS, *SKETCHES])
def test_every_mix_gives_the_types_of_llama_quantize(name, sources, tmp_path):
    """With and without importance; what llama-quantize refuses is refused."""
    if name in SKETCHES:
        arch, config = SKETCHES[name]
        source = sketch(tmp_path / "sketch.gguf", arch, sources["dense"][0].metadata(), **config)
        checkpoint = open_checkpoint(source)
        stats = fake_stats(checkpoint)
    else:
        checkpoint, source, stats = sources[name]
    first = ActivationStats(tensors=dict([next(iter(stats.tensors.items()))]))  # types depend on its presence only
    for mix in BASE:
        theirs, _ = announced(source, mix, first)
        blind, needs_imatrix = announced(source, mix, None)
        for given, expected in ((stats, theirs), (None, None if needs_imatrix else blind)):
            try:
                plan = standard_plan(checkpoint, mix, given)
            except PlanError as error:
                assert expected is None, (mix, error)
                continue
            ours = {tensor: entry.format for tensor, entry in plan.tensors.items()}
            assert ours == expected, (mix, "with importance" if given else "without")


def test_mixes_and_their_numbers_are_those_of_llama_quantize():
    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-quantize"
    if not tool.exists():
        oracle.missing(str(tool))
    text = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    listed = {name: int(number) for number, name in re.findall(r"^ +(\d+) +or +(\w+) +:", text, re.MULTILINE)}
    assert listed == {mix: FILE_TYPES[ALIASES.get(mix, mix)] for mix in [*BASE, *ALIASES]}


def test_rules_name_each_mix_once():
    for kind, table in RULES.items():
        mixes = " ".join(table).split()
        assert set(mixes) <= BASE.keys() and len(mixes) == len(set(mixes)), kind


def test_stock_llama_quantize_reads_our_imatrix(sources, tmp_path):
    """The same command as users type, with our imatrix.gguf."""
    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-quantize"
    if not tool.exists():
        oracle.missing(str(tool))
    checkpoint, source, stats = sources["moe"]
    write_imatrix(tmp_path / "imatrix.gguf", stats)
    assert sorted(read_imatrix(tmp_path / "imatrix.gguf").tensors) == sorted(stats.tensors)
    done = subprocess.run(
        [tool, "--imatrix", tmp_path / "imatrix.gguf", source, tmp_path / "theirs.gguf", "Q3_K_M"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert f"have importance matrix data with {len(stats.tensors)} entries" in done.stdout + done.stderr
    run(checkpoint, standard_plan(checkpoint, "Q3_K_M", stats), tmp_path / "ours.gguf", stats=stats)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert {n: e.format.name for n, e in ours.entries.items()} == {n: e.format.name for n, e in theirs.entries.items()}


def test_a_mix_that_needs_statistics_says_so(sources, tmp_path):
    checkpoint, source, stats = sources["dense"]
    for given, use in ((None, True), (stats, False)):
        with pytest.raises(PlanError, match="Q2_K_S needs activation statistics.*blk.0.attn_k.weight becomes Q2_K"):
            standard_plan(checkpoint, "Q2_K_S", given, use)
    gap = ActivationStats(tensors={name: entry for name, entry in stats.tensors.items() if name != "blk.1.attn_q.weight"})
    assert not llama_quantize(source, tmp_path / "theirs.gguf", "Q2_K_S", gap)
    with pytest.raises(PlanError, match="makes blk.1.attn_q.weight Q2_K, which needs activation statistics"):
        standard_plan(checkpoint, "Q2_K_S", gap)
    standard_plan(checkpoint, "Q2_K", gap)


def test_mixes_that_cannot_be_are_refused(sources):
    with pytest.raises(PlanError, match="known mixes"):
        standard_plan(sources["dense"][0], "Q9_K", None)
    with pytest.raises(PlanError, match="rows of 64, which do not fit Q1_0"):
        standard_plan(sources["llama"][0], "Q1_0", None)
    assert "F16" in {entry.format for entry in uniform_plan(sources["llama"][0], "Q1_0", None).tensors.values()}
