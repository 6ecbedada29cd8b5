"""Expert coverage: lacking experts get natural tokens, nothing else changes; floors of roles can be seen and changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit.analysis import coverage, moments
from quantkit.analysis.calibration import calibrate
from quantkit.analysis.coverage import COLUMNS, Coverer, coverage_rows, wanted_tokens
from quantkit.analysis.imatrix import check_stats, read_imatrix, write_imatrix
from quantkit.analysis.moments import MomentWriter
from quantkit.analysis.texts import CalibrationText, load_calibration
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.roles import Role
from quantkit.encoders.stats import TensorStats
from quantkit.errors import FormatError, PlanError
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.skeleton import materialized_model
from quantkit.planning.plan import Assignment
from quantkit.planning.policy import FLOORS, Policy, parse_floors
from quantkit.planning.standard import standard_plan, uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer import pipeline

LAYER, NEVER, RARE = 1, (0, 1), (2, 3)
PARTS = ("gate", "up", "down")
TEXT = tiny.EXAMPLES.parent / "text" / "tinystories.txt"
TOKENS = 8192


def tensor(part: str) -> str:
    return f"blk.{LAYER}.ffn_{part}_exps.weight"


def router_passes(folder: Path, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router of LAYER gets and gives in transformers' own forward: (tokens, width), (tokens, experts)."""
    model = materialized_model(open_checkpoint(folder))
    xs, logits = [], []

    def see(module, inputs, output):
        xs.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        logits.append(output[0])

    model.model.layers[LAYER].mlp.gate.register_forward_hook(see)
    with torch.inference_mode():
        for batch in torch.from_numpy(windows).split(4):
            model.model(batch)
    return torch.cat(xs), torch.cat(logits)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder, text): qk-moe-11m whose router never takes two experts of LAYER, and two more for under 0.5 % of the tokens.

    Along the direction u with u·x ≈ 1 for every token, the logit of an expert is lowered as by a bias.
    """
    folder = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(tiny.MOE, folder)
    (folder.parent / "stories.txt").write_text(TEXT.read_text()[:100_000])
    text = load_calibration(open_checkpoint(folder), [folder.parent / "stories.txt"], TOKENS)
    x, logits = router_passes(folder, np.concatenate([text.train, text.further()]))
    u = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]
    assert (x @ u).min() > 0.1
    others = logits[:, max(RARE) + 1 :].topk(2).values[:, -1]
    weights = load_file(folder / "model.safetensors")
    name = f"model.layers.{LAYER}.mlp.gate.weight"
    router = weights[name].float()
    for expert in (*NEVER, *RARE):
        needed = (logits[:, expert] - others) / (x @ u)
        router[expert] -= u * (needed.max() + 0.5 if expert in NEVER else needed.quantile(0.997))
    weights[name] = router
    save_file(weights, folder / "model.safetensors")
    return folder, text


@pytest.fixture(scope="module")
def covered(planted, tmp_path_factory):
    """(checkpoint, calibration, the same without filling up)."""
    folder, text = planted
    checkpoint = open_checkpoint(folder)
    out = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("with", "without"):
            full = MomentWriter(tmp_path_factory.mktemp(name), checkpoint, name)
            out.append(calibrate(checkpoint, text, Progress(), full))
            patch.setattr(Coverer, "fill", lambda self, index: None)
    return checkpoint, *out


def test_every_expert_has_enough_tokens_after_and_its_traffic_stays_honest(covered, planted):
    _, filled, _ = covered
    entry = filled.coverage[LAYER]
    tokens = planted[1].train.size
    assert entry.wanted == 256 and entry.tokens == tokens
    assert [entry.routed[e] for e in NEVER] == [0, 0]
    assert all(0 < entry.routed[e] < 0.005 * tokens for e in RARE)
    assert min(entry.after) >= entry.wanted
    assert all(entry.further[e] > 0 for e in RARE) and all(entry.nearest[e] == entry.wanted for e in NEVER)
    for part in PARTS:
        stats = filled.stats.tensors[tensor(part)]
        assert stats.counts.tolist() == entry.routed and stats.counts.sum() == 2 * tokens
        assert stats.uncovered == [] and filled.stats.covers(tensor(part))
        assert stats.routed().uncovered == list(NEVER) and stats.routed().importance(NEVER[0]) is None
        assert stats.borrowed.tolist() == [f + n for f, n in zip(entry.further, entry.nearest, strict=True)]


def test_nothing_else_changes_by_a_bit(covered):
    checkpoint, filled, plain = covered
    assert set(filled.stats.tensors) == set(plain.stats.tensors)
    lacking = {c.layer: c.to_json()["lacking_before"] for c in filled.coverage}
    assert set(lacking[LAYER]) == {*NEVER, *RARE}
    for name, entry in filled.stats.tensors.items():  # those of later layers and the head: hidden states are the same
        other, info = plain.stats.tensors[name], checkpoint.info(name)
        assert entry.sum_squares.tobytes() == other.sum_squares.tobytes() and entry.counts.tobytes() == other.counts.tobytes()
        for expert in range(info.experts):
            if info.experts > 1 and expert in lacking[info.layer]:
                continue
            assert entry.importance(expert).tobytes() == other.importance(expert).tobytes()
            ours, theirs = (c.stats.moments_of(name, expert).read() for c in (filled, plain))
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), (name, expert)
    assert filled.facts == plain.facts


def test_borrowed_statistics_are_those_of_the_nearest_tokens(covered, planted):
    """Against transformers' own forward over all text, sorted by the gap to the top k."""
    checkpoint, filled, _ = covered
    folder, text = planted
    x, logits = router_passes(folder, np.concatenate([text.train, text.further()]))
    gap = logits.topk(2).values[:, -1:] - logits
    gate, up = (torch.from_numpy(checkpoint.read(tensor(part))) for part in ("gate", "up"))
    for expert in NEVER:
        near = x[gap[:, expert].argsort()[:256]]
        mid = torch.nn.functional.silu(near @ gate[expert].T) * (near @ up[expert].T)
        for part, inputs in (("gate", near), ("up", near), ("down", mid)):
            name = tensor(part)
            importance = filled.stats.importance(name, expert)
            np.testing.assert_allclose(importance, inputs.square().mean(0).numpy(), rtol=1e-3)
            if part != "down":  # and all tokens together would not pass
                assert np.abs(np.log(importance / x.square().mean(0).numpy())).mean() > 0.1
            full = filled.stats.moments_of(name, expert).read()[0]
            np.testing.assert_allclose(full, (inputs.T @ inputs / len(inputs)).numpy(), atol=1e-3 * full.max())
        assert filled.coverage[LAYER].gap[expert] == pytest.approx(float(gap[:, expert].sort().values[255]), rel=1e-3)


def test_gates_are_averaged_and_weigh_the_experts(covered, planted):
    _, filled, _ = covered
    folder, text = planted
    probabilities = router_passes(folder, text.train)[1].softmax(-1)
    values, chosen = probabilities.topk(2)
    entry, shares = filled.coverage[LAYER], filled.stats.tensors[tensor("up")].shares
    squares = [float(values[chosen == e].square().sum()) for e in range(8)]
    for expert in range(8):
        mean = float(values[chosen == expert].mean()) if (chosen == expert).any() else 0.0
        assert entry.gate[expert] == pytest.approx(mean, rel=1e-4)
        assert shares[expert] == pytest.approx(squares[expert] / sum(squares), rel=1e-4)
    assert TensorStats(np.ones((2, 1)), np.array([1, 3])).shares.tolist() == [0.25, 0.75]


def test_formats_that_need_statistics_become_possible(covered, tmp_path):
    checkpoint, filled, _ = covered
    before, after = (uniform_plan(checkpoint, "IQ2_XXS", s) for s in (filled.stats.routed(), filled.stats))
    assert before.tensors[tensor("up")].format == "IQ2_S" and after.tensors[tensor("up")].format == "IQ2_XXS"
    refused = uniform_plan(checkpoint, "IQ2_XXS", filled.stats)
    with pytest.raises(PlanError, match=r"no calibration token reached experts \[0, 1\]"):
        refused.check_importance(filled.stats.routed())
    for info in checkpoint.tensors.values():  # one layer is enough
        if info.quantizable and info.name not in {tensor(part) for part in PARTS}:
            after.tensors[info.name] = Assignment("Q8_0")
    after.tensors[tensor("down")] = Assignment("IQ2_XXS", "ldlq")  # error feedback: the full moments are there too
    pipeline.run(checkpoint, after, tmp_path / "x.gguf", stats=filled.stats)
    entries = GgufFile(tmp_path / "x.gguf").entries
    assert {entries[tensor(part)].format.name for part in PARTS} == {"IQ2_XXS"}


def test_further_text_is_not_read_while_nothing_lacks(tiny_folder, monkeypatch):
    def never(*_):
        raise AssertionError("further text was read")

    ids = np.random.default_rng(0).integers(3, 4096, (4, 64)).astype(np.int64)
    text = CalibrationText(ids, ids, ("x",), never)
    for name in ("qwen2_moe", "llama"):
        monkeypatch.setattr(coverage, "wanted_tokens", lambda *_: 1)
        found = calibrate(open_checkpoint(tiny_folder(name)), text, Progress())
        assert all(stats.borrowed is None for stats in found.stats.tensors.values())
        assert len(found.coverage) == (2 if name == "qwen2_moe" else 0)
    monkeypatch.setattr(coverage, "wanted_tokens", lambda *_: 500)
    with pytest.raises(AssertionError, match="was read"):
        calibrate(open_checkpoint(tiny_folder("qwen2_moe")), text, Progress())


def test_one_layer_in_memory_and_no_expert_sees_all_tokens(tiny_folder, monkeypatch):
    checkpoint = open_checkpoint(tiny_folder("qwen3_moe"))
    ids = np.random.default_rng(0).integers(3, 4096, (3, 16)).astype(np.int64)
    loaded, most = [], []
    layer = Blocks.layer

    def counted(self, *args, **keywords):
        loaded.append(sum(not p.is_meta for block in self.model.model.layers for p in block.parameters()))
        return layer(self, *args, **keywords)

    monkeypatch.setattr(Blocks, "layer", counted)
    monkeypatch.setattr(coverage, "wanted_tokens", lambda *known: most.append(wanted_tokens(*known)) or most[-1])
    found = calibrate(checkpoint, CalibrationText(ids, ids, ("x",), lambda: ids[:0]), Progress())
    assert loaded and not any(loaded)  # the layer before is gone when the next one comes
    assert most == [ids.size * 2 // 4] * 2  # 64 columns, but no more than an even share
    assert all(max(c.nearest) <= c.wanted < ids.size for c in found.coverage)
    assert (wanted_tokens(4096, 65536, 8, 128), wanted_tokens(7168, 65536, 8, 256), wanted_tokens(64, 4, 1, 8)) == (4096, 2048, 1)


def test_a_matrix_shared_by_all_experts_is_left_alone(planted, covered, tmp_path, monkeypatch):
    folder, text = planted
    checkpoint = open_checkpoint(folder)
    text = CalibrationText(text.train[:4], text.dev, ("x",), lambda: text.train[:0])
    monkeypatch.setattr(moments, "TENSOR_BYTES", 1 << 18)
    monkeypatch.setattr(coverage, "TENSOR_BYTES", 1 << 18)
    found = []
    for name in ("with", "without"):
        full = MomentWriter(tmp_path / name, checkpoint, name)
        found.append(calibrate(checkpoint, text, Progress(), full).stats)
        monkeypatch.setattr(Coverer, "fill", lambda self, index: None)
    assert found[0].tensors[tensor("up")].borrowed is not None
    ours, theirs = (np.asarray(stats.moments_of(tensor("up"), NEVER[0]).read()) for stats in found)
    assert ours.tobytes() == theirs.tobytes()


def test_the_table_has_a_row_for_each_layer(covered):
    rows = coverage_rows([entry.to_json() for entry in covered[1].coverage])
    assert len(rows) == 4 and {len(row) for row in rows} == {len(COLUMNS)}
    row = dict(zip(COLUMNS, rows[LAYER], strict=True))
    assert (row["layer"], row["never"], row["fewest tokens"], row["too few"], row["too few after"]) == ("1", "2", "0", "4", "0")
    assert int(row["fewest after"]) >= 256


def test_further_windows_are_new(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("llama"))
    own = tmp_path / "own.txt"
    own.write_text(TEXT.read_text()[:60_000])
    for files in (None, [own]):
        text = load_calibration(checkpoint, files, 8192)
        further = text.further()
        assert further.shape[1] == text.window and 0 < further.size <= text.train.size
        used = {row.tobytes() for row in (*text.train, *text.dev)}
        assert not used & {row.tobytes() for row in further}
    own.write_text(TEXT.read_text()[:800])  # one short window, cut in halves: what is further comes from the mix alone
    text = load_calibration(checkpoint, [own], 8192)
    assert text.further().shape[1] == text.window < 512


def test_floors_are_parsed_and_shown():
    assert parse_floors([]) == FLOORS
    floors = parse_floors(["attention=q4_k", "attn_v=Q6_K", "experts=IQ2_S", "head=none", "router=F32"])
    assert floors[Role.ATTN_Q] == "Q4_K" and floors[Role.ATTN_V] == "Q6_K" and floors[Role.EXPERT_DOWN] == "IQ2_S"
    assert Role.HEAD not in floors and Role.ROUTER not in floors
    assert parse_floors(["shared=Q6_K", "none"]) == dict.fromkeys((Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN), "Q6_K")
    rules = Policy(floors=floors).describe()
    assert {"shared at least Q2_K", "experts at least IQ2_S", "attn_v at least Q6_K"} < set(rules)
    assert any("router is F32" in rule for rule in rules)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attention", "not ROLE=FORMAT"), ("=Q4_K", "not ROLE=FORMAT"), ("attention=", "not ROLE=FORMAT"),
        ("atention=Q4_K", "unknown role 'atention'"), ("router=Q8_0", "never quantizes the router"),
        ("norm=Q8_0", "never quantizes the norm"),
    ],
)  # fmt: skip
def test_wrong_floors_are_refused(text, words):
    with pytest.raises(PlanError, match=words):
        parse_floors([text])
    with pytest.raises(FormatError, match="unknown format 'Q4_Q'"):
        parse_floors(["head=Q4_Q"])


def test_floors_limit_what_a_tensor_may_get():
    from quantkit.formats import get_format

    checkpoint = open_checkpoint(tiny.MOE)
    offered = [get_format(name) for name in ("IQ1_S", "Q2_K", "IQ3_S", "Q4_K", "Q6_K", "F16")]
    for floors, name, least in (
        ([], "blk.0.ffn_up_exps.weight", "IQ1_S"), (["experts=IQ3_S"], "blk.0.ffn_up_exps.weight", "IQ3_S"),
        ([], "blk.0.attn_k.weight", "Q2_K"), (["none"], "blk.0.attn_k.weight", "IQ1_S"),
        (["shared=Q6_K"], "blk.0.ffn_down_shexp.weight", "Q6_K"), (["attention=F32"], "blk.0.attn_k.weight", "F16"),
    ):  # fmt: skip
        allowed = Policy(floors=parse_floors(floors)).allowed(checkpoint.info(name), offered)
        assert allowed[0].name == least


def test_what_experts_borrowed_survives_the_file_and_llama_quantize_does_not_see_it(covered, tmp_path):
    checkpoint, filled, plain = covered
    path = tmp_path / "i.gguf"
    write_imatrix(path, filled.stats)
    back = read_imatrix(path)
    check_stats(back, checkpoint)
    assert {n: e.tobytes() for n, e in back.tensors.items()} == {n: e.tobytes() for n, e in filled.stats.tensors.items()}
    assert back.tensors[tensor("up")].shares.tolist() == filled.stats.tensors[tensor("up")].shares.tolist()
    plan = standard_plan(checkpoint, "Q2_K_S", back)
    assert "experts [0, 1] have no statistics and are weighted with ones" in plan.tensors[tensor("up")].reason
    pipeline.run(checkpoint, plan, tmp_path / "ours.gguf", stats=back)
    pipeline.run(checkpoint, standard_plan(checkpoint, "Q2_K_S", plain.stats), tmp_path / "plain.gguf", stats=plain.stats)
    pipeline.run(checkpoint, uniform_plan(checkpoint, "F32", None), tmp_path / "f32.gguf")
    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-quantize"
    if not tool.exists():
        oracle.missing(str(tool))
    subprocess.run(
        [tool, "--imatrix", path, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "Q2_K_S", "1"], check=True, capture_output=True
    )
    files = [GgufFile(tmp_path / f"{name}.gguf") for name in ("ours", "plain", "theirs")]
    for part in PARTS:
        info = checkpoint.info(tensor(part))
        ours, same, theirs = (f.read_packed(info.name, 0, info.rows) for f in files)
        assert np.array_equal(ours, same)
        assert np.mean(ours != theirs) < 1e-3, part
