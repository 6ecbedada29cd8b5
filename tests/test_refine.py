"""Refining and refitting: rows in the right order, only what may change changes, and nothing is kept that does not help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

import quantkit
from quantkit.analysis.texts import load_calibration
from quantkit.analysis.windows import refit_windows
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders.parameters import Parameters
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.modeling.skeleton import materialized_model, parameter_value
from quantkit.planning.dynamic import dynamic_plan
from quantkit.planning.policy import Policy
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer import pipeline, refine
from quantkit.quantizer.refit import refit


@pytest.fixture(scope="module")
def planned(known, analyzed):
    (checkpoint, sensitivity, stats), text = known, analyzed[2]
    plan = dynamic_plan(checkpoint, sensitivity, stats, int(checkpoint.n_weights * 3.4 / 8) + 200_000, Policy())
    return checkpoint, stats, sensitivity, plan, load_calibration(checkpoint, [text], 8192)


def as_weights(checkpoint, plan, packed):
    """How the tensors would be read back from a file."""

    def read(name):
        if name not in packed:
            return checkpoint.read(name)
        return get_format(plan.tensors[name].format).decode(packed[name]).reshape(checkpoint.info(name).shape)

    return read


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "qwen3_moe"])
def test_learned_weights_stand_in_the_rows_of_the_file(architecture, tmp_path):
    checkpoint = open_checkpoint(tiny.build(architecture, tmp_path / "m"))
    plan = uniform_plan(checkpoint, "Q4_1", None)
    packed = {
        name: get_format("Q4_1").blocks(data).view(np.uint8).reshape(len(data), -1)
        for name, data in pipeline.encode_all(checkpoint, plan, None).items()
        if plan.tensors[name].format == "Q4_1"
    }
    learning = refine.Refinement(checkpoint, plan, packed)
    rng = np.random.default_rng(0)
    for matrix in learning.matrices.values():
        for factor in matrix.learned:
            factor.data *= 1 + 0.2 * factor.new_tensor(rng.standard_normal(factor.shape).astype(np.float32))
    for value in learning.vectors.values():
        value.data += 0.1 * value.new_tensor(rng.standard_normal(value.shape).astype(np.float32))
    values = learning._values()
    read = as_weights(checkpoint, plan, learning.pack())
    assert any("norm" in name for name in values)
    for parameter, value in values.items():
        if parameter == "lm_head.weight" and checkpoint.tied:
            continue
        again = parameter_value(checkpoint, parameter, read).numpy()
        assert np.allclose(value.detach().numpy(), again, rtol=2e-3, atol=2e-3), parameter  # scales are halves


def test_only_scales_and_vectors_change_and_the_text_apart_gets_closer(planned, tmp_path):
    checkpoint, stats, _, plan, text = planned
    packed = pipeline.encode_all(checkpoint, plan, stats)
    found = refine.refine(checkpoint, plan, packed, text.train, text.dev, 1.0)
    assert found.after < found.before
    assert {checkpoint.info(name).name for name in found.packed} > set(packed) - {
        n for n in packed if "MXFP4" in plan.tensors[n].format
    }
    for name, rows in found.packed.items():
        fmt = get_format(plan.tensors[name].format)
        if not fmt.is_quantized():
            assert fmt.name == "F32"
            continue
        before, after = Parameters(packed[name], fmt), Parameters(rows, fmt)
        assert np.array_equal(before.scale, after.scale)
        assert np.array_equal(before.minimum, after.minimum)
        same = (before.entries, after.entries) if before.book else (before.values, after.values)
        assert np.array_equal(*same)
    path = tmp_path / "refined.gguf"
    pipeline.run(checkpoint, plan, path, stats=stats, given=found.packed, notes=["refined"])
    written = open_checkpoint(path)
    norm = next(name for name in found.packed if "norm" in name)
    assert np.array_equal(written.read(norm), found.packed[norm].view("<f4").reshape(checkpoint.info(norm).shape))
    import torch

    ids = torch.from_numpy(text.dev[:2])
    with torch.inference_mode():
        wanted, given = (materialized_model(model)(ids).logits.log_softmax(-1) for model in (checkpoint, written))
    measured = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    assert measured == pytest.approx(refine.Refinement(checkpoint, plan, packed).mean(text.dev[:2]), rel=0.5)
    assert measured < refine.Refinement(checkpoint, plan, packed).mean(text.dev[:2])


def test_what_does_not_help_is_not_kept(planned, monkeypatch):
    checkpoint, stats, _, plan, text = planned
    monkeypatch.setattr(refine, "VECTOR_RATE", 3.0)
    packed = pipeline.encode_all(checkpoint, plan, stats)
    found = refine.refine(checkpoint, plan, packed, text.train[:8], text.dev[:2], 1.0)
    assert found.packed == {}
    assert found.after == found.before


def test_a_model_that_is_too_large_is_refused(planned, monkeypatch):
    checkpoint, _, _, plan, _ = planned
    monkeypatch.setattr(refine, "LARGEST", 1000)
    with pytest.raises(PlanError, match="four times") as refused:
        refine.Refinement(checkpoint, plan, {})
    assert "--effort 3" in refused.value.hint


def test_refit_never_ends_worse_and_stays_in_its_budget(planned):
    checkpoint, stats, sensitivity, plan, text = planned
    size = plan.file_bytes

    def solve(cost):
        return dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), cost=cost)

    found = refit(
        checkpoint,
        sensitivity,
        stats,
        refit_windows(checkpoint, text),
        solve,
        lambda info: set(sensitivity.tensors[info.name].formats),
        Progress(),
    )
    assert found.measured == min(kld for _, kld, kept in found.history if kept) <= found.history[0][1]
    assert found.plan.file_bytes <= size
    assert len(found.history) > 1
    probed = {row.tobytes() for row in text.train}
    assert not any(row.tobytes() in probed for row in refit_windows(checkpoint, text))


def test_the_dial_refines_and_the_next_run_reuses_it(analyzed, tmp_path, monkeypatch):
    folder, work, text = analyzed
    given = {"bpw": 2.8, "work": work, "calibration": [text], "tokens": 8192, "effort": 4}
    path, manifest = quantkit.quantize(folder, tmp_path / "a.gguf", **given)
    assert [note.split(":")[0] for note in manifest.notes] == ["sequential", "refined"]
    monkeypatch.setattr(refine, "refine", lambda *a, **k: pytest.fail("refined again"))
    again, _ = quantkit.quantize(folder, tmp_path / "b.gguf", **given)
    assert path.read_bytes() == again.read_bytes()


def test_what_is_not_learned_beside_it_is_as_the_plan_gives_it_back(tmp_path):
    checkpoint = open_checkpoint(tiny.build("qwen2_moe", tmp_path / "m"))
    plan = uniform_plan(checkpoint, "Q4_1", None)
    name = "blk.0.ffn_up_exps.weight"
    plan.tensors[name] = replace(plan.tensors[name], format="MXFP4")
    packed = pipeline.encode_all(checkpoint, plan, None)
    learning = refine.Refinement(checkpoint, plan, packed)
    assert name not in learning.matrices
    fused = learning._values()["model.layers.0.mlp.experts.gate_up_proj"].detach().numpy()
    assert np.array_equal(fused[:, fused.shape[1] // 2 :], as_weights(checkpoint, plan, packed)(name))
