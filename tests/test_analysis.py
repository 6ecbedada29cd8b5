"""Sensitivity: Fisher against probes, planted super weights, the analysis file."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit.analysis import errors, pieces
from quantkit.analysis.calibration import calibrate
from quantkit.analysis.errors import measure_errors
from quantkit.analysis.fisher import measure_fisher
from quantkit.analysis.predict import fill_predictions, fit_composition
from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.probing import decoded
from quantkit.analysis.run import ANALYSIS, IMATRIX, PICTURE
from quantkit.analysis.sensitivity import FormatCost, Sensitivity, TensorSensitivity
from quantkit.analysis.superweights import find_super_weights
from quantkit.analysis.texts import CalibrationText, load_calibration
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CalibrationError
from quantkit.formats import get_format
from quantkit.modeling.skeleton import materialized_model, row_order
from quantkit.progress import Progress


@pytest.fixture(scope="module")
def dense():
    checkpoint = open_checkpoint(tiny.DENSE)
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 12288)
    stats = calibrate(checkpoint, text, Progress()).stats
    return checkpoint, text, stats


def test_fisher_predicts_what_probes_measure(dense):
    """On a trained model the second-order estimate is within a third of the true KL divergence for most tensors."""
    checkpoint, text, stats = dense
    fisher = measure_fisher(checkpoint, text.train[:10], Progress())
    tensors = measure_errors(checkpoint, stats, fisher, Progress())
    model = ProbeModel(checkpoint, text.dev[:4])
    names = [f"blk.{i}.{part}.weight" for i in (0, 2, 5) for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    ratios = [tensors[n].formats["Q4_K"].fisher_kld / model.divergence({n: decoded(checkpoint, stats, n, "Q4_K")}) for n in names]
    assert np.median(np.abs(np.log2(ratios))) < 0.4
    assert np.abs(np.log2(ratios)).max() < 1.2


def test_fisher_block_by_block_equals_the_whole_model(tiny_folder):
    """The streamed backward pass gives the gradients of the whole model for the same labels."""
    checkpoint = open_checkpoint(tiny_folder("llama"))
    ids = np.random.default_rng(0).integers(3, 4096, (2, 24)).astype(np.int64)
    streamed = measure_fisher(checkpoint, ids, Progress(), seed=5)
    model = materialized_model(checkpoint)
    captured = {}

    def hook(module, inputs, output):
        output.register_hook(lambda g: captured.__setitem__(module, g.reshape(-1, g.shape[-1]).double().square().sum(0)))

    layer = model.model.layers[0]
    linears = {"ffn_up": layer.mlp.up_proj, "attn_q": layer.self_attn.q_proj}
    for module in linears.values():
        module.register_forward_hook(hook)
    embeds = model.model.embed_tokens(torch.from_numpy(ids)).requires_grad_(True)
    logp = model(inputs_embeds=embeds).logits.log_softmax(-1).reshape(-1, 4096)
    labels = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(5))
    logp.gather(1, labels).sum().backward()
    for part, module in linears.items():
        name = f"blk.0.{part}.weight"
        order = row_order(checkpoint, name)
        assert (order != np.arange(len(order))).any() == (part == "attn_q")  # llama.cpp's order of rows
        np.testing.assert_allclose(streamed.rows[name][0][order], captured[module].numpy() / ids.size, rtol=1e-3)


def test_a_probe_leaves_the_model_as_it_was(dense):
    checkpoint, text, stats = dense
    model = ProbeModel(checkpoint, text.dev[:1])
    name = "token_embd.weight"
    first = model.divergence({name: decoded(checkpoint, stats, name, "Q3_K")})
    assert model.divergence({name: checkpoint.read(name)}) < 1e-9
    assert model.divergence({name: decoded(checkpoint, stats, name, "Q3_K")}) == first
    both = {n: decoded(checkpoint, stats, n, "Q2_K") for n in ("blk.0.ffn_up.weight", "blk.3.attn_q.weight")}
    assert model.divergence(both) > model.divergence({"blk.3.attn_q.weight": both["blk.3.attn_q.weight"]})


def test_a_planted_super_weight_is_found(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.DENSE, folder)
    weights = load_file(folder / "model.safetensors")
    layer, row, column = 2, 17, 333
    weights[f"model.layers.{layer}.mlp.up_proj.weight"][column] *= 60
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, column] *= 0.02
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][row, column] = 4.0
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 4096)
    found = find_super_weights(checkpoint, calibrate(checkpoint, text, Progress()).facts)
    assert [(w["layer"], w["row"], w["column"]) for w in found] == [(layer, row, column)]
    plain = open_checkpoint(tiny.DENSE)
    assert find_super_weights(plain, calibrate(plain, text, Progress()).facts) == []


def test_activations_that_are_not_finite_are_named(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][5] = 1e30
    save_file(weights, folder / "model.safetensors")
    ids = np.full((1, 16), 9, np.int64)
    with pytest.raises(CalibrationError, match=r"blk\.0\.attn_q\.weight is not finite in channel 5"):
        calibrate(open_checkpoint(folder), CalibrationText(ids, ids, ("x",)), Progress())


def test_the_work_directory(analyzed):
    folder, work, _ = analyzed
    assert {p.name for p in work.iterdir()} >= {ANALYSIS, IMATRIX, PICTURE}
    sensitivity = Sensitivity.read(work / ANALYSIS)
    checkpoint = open_checkpoint(folder)
    assert sensitivity.identity == checkpoint.identity and sensitivity.estimator == "probes"
    assert Sensitivity.from_json(sensitivity.to_json(), "x") == sensitivity
    for name, tensor in sensitivity.tensors.items():
        costs = [tensor.formats[f].predicted_kld for f in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")]
        assert costs == sorted(costs, reverse=True) and costs[-1] >= 0, name
        assert all(0 < c.weight_error < 1 for f, c in tensor.formats.items() if get_format(f).bpw() > 2.5), name
    assert (work / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_damaged_analysis_files(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist"):
        Sensitivity.read(tmp_path / "x.json")
    for text in ("{", "{}", '{"quantkit_analysis": 99}', '{"quantkit_analysis": 1, "tensors": {"a": 3}}'):
        with pytest.raises(CalibrationError, match="x.json"):
            Sensitivity.from_json(text, "x.json")


def test_predictions_interpolate_between_probes():
    tensor = TensorSensitivity("attn_q", 0, (4, 256), 3.0, 0, {
        "Q2_K": FormatCost(0, 0, 1.0, 2.0), "Q3_K": FormatCost(0, 0, 0.1), "Q4_K": FormatCost(0, 0, 0.01, 0.08), "Q8_0": FormatCost(0, 0, 1e-4),
    })  # fmt: skip
    fill_predictions(tensor)
    assert tensor.formats["Q2_K"].predicted_kld == 2.0 and tensor.formats["Q4_K"].predicted_kld == 0.08
    assert tensor.formats["Q3_K"].predicted_kld == pytest.approx(0.4)  # the ratio is 4 half-way between 2 and 8
    assert tensor.formats["Q8_0"].predicted_kld == pytest.approx(8e-4)


def test_composition_recovers_a_power_law():
    x = [0.01, 0.1, 1.0]
    assert fit_composition(x, [0.5 * v**1.1 for v in x]) == pytest.approx((0.5, 1.1))
    assert fit_composition([0.1], [0.05]) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_pieces_of_a_large_tensor_tell_what_all_of_it_would(model, monkeypatch):
    """A few rows and columns: formats compare as on the whole tensor, and what they cost is about the same."""
    checkpoint = open_checkpoint(tiny.DENSE if model == "dense" else tiny.MOE)
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 6144)
    stats = calibrate(checkpoint, text, Progress()).stats
    fisher = measure_fisher(checkpoint, text.train[:6], Progress())
    monkeypatch.setattr(errors, "offered_formats", lambda info, stats=None: [get_format(n) for n in ("Q2_K", "IQ4_XS", "Q8_0")])
    parts = ("token_embd", "blk.1.ffn_down", "blk.1.ffn_up_exps", "blk.1.ffn_down_exps", "blk.2.ffn_gate")
    names = [f"{part}.weight" for part in parts if f"{part}.weight" in checkpoint.tensors]

    def measured():
        return {n: errors._measure_tensor(checkpoint, checkpoint.info(n), stats, fisher, None).formats for n in names}

    whole = measured()
    monkeypatch.setattr(pieces, "WHOLE_WEIGHTS", 1 << 15)
    monkeypatch.setattr(pieces, "PIECE_ROWS", 64)
    monkeypatch.setattr(pieces, "PIECE_COLUMNS", 256)
    part = measured()
    for name in names:
        covered = list(pieces.pieces_of(checkpoint.info(name), stats))
        shares = [(p.rows.stop - p.rows.start) * (p.columns.stop - p.columns.start) for p in covered]
        assert sum(shares) < checkpoint.info(name).size
        assert len({(p.expert, p.rows.start, p.columns.start) for p in covered}) == len(covered)
        ratios = {fmt: part[name][fmt].fisher_kld / whole[name][fmt].fisher_kld for fmt in whole[name]}
        middle = np.median(list(ratios.values()))
        assert all(0.9 < ratio / middle < 1.1 for ratio in ratios.values()), (name, ratios)
        assert 0.65 < middle < 1.5, (name, ratios)
