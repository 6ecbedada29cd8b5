"""Comparison: both runtimes agree on decoded weights, the original loses nothing, order is right, the report is whole."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_writer import write_gguf
from quantkit.cli import main
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.evaluation.compare import compare
from quantkit.evaluation.report.page import render_html
from quantkit.evaluation.texts import default_texts
from quantkit.metrics import TokenScores, summarize
from quantkit.planning.artifact import output_metadata, tensor_specs
from quantkit.planning.standard import uniform_plan
from quantkit.planning.sweep import Point, Sweep
from quantkit.quantizer.pipeline import run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    checkpoint = open_checkpoint(tiny.MOE)
    for name in ("BF16", "Q8_0", "Q4_K", "Q2_K"):
        run(checkpoint, uniform_plan(checkpoint, name, None), folder / f"{name}.gguf")
    return folder


def test_the_original_loses_nothing_and_order_is_right(files):
    names = ["BF16", "Q8_0", "Q4_K", "Q2_K"]
    report = compare(tiny.MOE, [files / f"{n}.gguf" for n in names], default_texts(), limit=2048)
    same = report.candidates[0].divergence
    assert same.max_kld < 1e-6 and same.top1_agreement == 1 and same.perplexity_ratio == pytest.approx(1, abs=1e-6)
    klds = [c.divergence.mean_kld for c in report.candidates]
    assert klds == sorted(klds) and 1e-3 < klds[2] < 0.1 < klds[3]
    assert report.tokens == 4 * 255
    assert json.loads(report.to_json())["candidates"][2]["bpw"] == pytest.approx(report.candidates[2].bpw)


def decoded_copy(source, target):
    """The F32 GGUF of the decoded weights of a quantized file."""
    checkpoint = open_checkpoint(source)
    plan = uniform_plan(checkpoint, "F32", None)
    specs = tensor_specs(checkpoint, plan)
    with write_gguf(target, output_metadata(checkpoint, plan, None), specs) as writer:
        for spec in specs:
            writer.write(spec.name, checkpoint.read(spec.name))
    return target


def test_torch_and_llama_cpp_agree_on_the_decoded_weights(files, tmp_path):
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        oracle.missing("llama-cpp-python")
    plain = decoded_copy(files / "Q4_K.gguf", tmp_path / "q4-f32.gguf")
    rows = {
        rt: compare(tiny.MOE, [plain], default_texts(), runtime=rt, limit=2048).candidates[0].divergence
        for rt in ("torch", "llama")
    }
    assert rows["llama"].mean_kld == pytest.approx(rows["torch"].mean_kld, rel=2e-3)
    assert rows["llama"].perplexity == pytest.approx(rows["torch"].perplexity, rel=1e-4)
    packed = compare(tiny.MOE, [files / "Q4_K.gguf"], default_texts(), runtime="llama", limit=2048).candidates[0].divergence
    assert packed.mean_kld == pytest.approx(
        rows["torch"].mean_kld, rel=0.3
    )  # llama.cpp rounds activations: reported, not bounded


def test_a_dynamic_file_loads_and_writes_in_llama_cpp(analyzed, tmp_path):
    try:
        import llama_cpp
    except ImportError:
        oracle.missing("llama-cpp-python")
    from quantkit.api import Options, quantize

    folder, work, text = analyzed
    path, manifest = quantize(folder, tmp_path / "x.gguf", bpw=3.5, options=Options(work=work, calibration=[text], tokens=8192))
    assert manifest.bpw <= 3.5
    model = llama_cpp.Llama(str(path), n_ctx=128, verbose=False)
    assert len(model("Once upon a time", max_tokens=8, temperature=0)["choices"][0]["text"]) > 0


def test_another_vocabulary_is_refused(files, tiny_folder, tmp_path):
    other = tmp_path / "other"
    import shutil

    shutil.copytree(tiny_folder("llama"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    word = next(k for k, v in vocab.items() if v == 4000)
    vocab["qqqq"] = vocab.pop(word)
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if word not in "".join(m)]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="token 4000 is 'qqqq'"):
        compare(tiny.MOE, [other], default_texts())


def test_a_text_that_is_too_short(files, tmp_path):
    (tmp_path / "t.txt").write_text("Short.")
    with pytest.raises(CalibrationError, match="fewer than 512 tokens"):
        compare(tiny.MOE, [files / "Q8_0.gguf"], [tmp_path / "t.txt"])


def test_the_report_is_one_offline_file(files):
    report = compare(tiny.MOE, [files / "Q4_K.gguf"], default_texts(), limit=1024)
    report.candidates[0].name = "<script>alert(1)</script>"
    html = render_html(report)
    assert "<script>alert" not in html and "&lt;script&gt;" in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert f"{report.candidates[0].divergence.mean_kld:.5f}" in html
    assert html.count("<svg") >= 2
    assert len(html) < 3_000_000


def test_windows_are_scored_like_llama_perplexity(files):
    """Second half of each window, the token after each scored position: the perplexity by hand."""
    import torch

    from quantkit.evaluation.compare import evaluation_windows
    from quantkit.modeling.skeleton import materialized_model

    checkpoint = open_checkpoint(tiny.MOE)
    windows = evaluation_windows(checkpoint, default_texts(), 512, 1024)
    assert windows.shape == (2, 512) and (windows[:, 0] == 0).all()
    model = materialized_model(checkpoint)
    nll = []
    with torch.inference_mode():
        for ids in windows:
            logp = model(torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1)
            nll += [-float(logp[i, ids[i + 1]]) for i in range(256, 511)]
    report = compare(tiny.MOE, [files / "Q8_0.gguf"], default_texts(), limit=1024)
    assert report.candidates[0].divergence.reference_perplexity == pytest.approx(float(np.exp(np.mean(nll))), rel=1e-4)


def test_models_too_large_to_decode_are_judged_packed(files, monkeypatch):
    """The same divergence, within rounding, with the weights as they are in the file."""
    texts = default_texts()
    decoded = compare(tiny.MOE, [files / "Q4_K.gguf"], texts, limit=1024).candidates[0].divergence
    monkeypatch.setattr("quantkit.evaluation.runners._memory_bytes", lambda device: 1 << 20)
    packed = compare(tiny.MOE, [files / "Q4_K.gguf"], texts, limit=1024).candidates[0].divergence
    assert packed.mean_kld == pytest.approx(decoded.mean_kld, rel=1e-3) and packed.tokens == decoded.tokens
    with pytest.raises(CheckpointError, match="cannot be put on cuda:7"):
        compare(tiny.MOE, [files / "Q4_K.gguf"], texts, limit=1024, device="cuda:7")


def test_texts_side_by_side(files, tmp_path):
    """Each model goes on after the prompt; the original with itself agrees to the end, and the report marks where others part."""
    command = [
        "compare",
        str(tiny.MOE),
        str(files / "Q8_0.gguf"),
        str(files / "Q4_K.gguf"),
        "--limit",
        "1024",
        "--prompt",
        "Once upon a time",
        "--append",
        str(tmp_path / "board.json"),
        "-o",
    ]
    said = CliRunner().invoke(main, [*command, str(tmp_path / "report.html"), "--json"])
    assert said.exit_code == 0, said.output
    texts = json.loads(said.output)["continued"]
    assert [text["model"] for text in texts] == [tiny.MOE.name, "Q8_0.gguf", "Q4_K.gguf"]
    assert (
        texts[0]["same"] == texts[0]["tokens"]
        and 0 <= texts[2]["same"] <= texts[2]["tokens"]
        and all(t["speed"] > 0 for t in texts)
    )
    html = (tmp_path / "report.html").read_text()
    assert texts[0]["text"].split()[0] in html and "leaderboard" in html.lower() and (tmp_path / "board.json").exists()
    table = CliRunner().invoke(main, [*command, str(tmp_path / "other.html"), "--breakdown"])
    assert table.exit_code == 0 and "tokens as the original's" in table.output and "its worst tokens" in table.output


def test_one_command_says_everything(files, tmp_path, monkeypatch):
    """Divergence, tasks and a sweep in one report, from the models or from files; what is of another model is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTKIT_DATA", "sample")
    points = [Point("p", "dynamic", 30_000, 4.0, 0.2, {}), Point("Q4_K_M", "stock", 40_000, 5.0, 0.1, {})]
    sweep = Sweep(tiny.MOE.name, "probes", points)
    (tmp_path / "sweep.json").write_text(sweep.to_json())
    command = ["compare", str(tiny.MOE), str(files / "Q4_K.gguf"), "--limit", "512"]
    more = ["--tasks", "piqa_local", "--sweep", "sweep.json", "-o", "report.html"]
    said = CliRunner().invoke(main, [*command, *more, "--json"])
    assert said.exit_code == 0, said.output
    answered = json.loads(said.stdout)["results"]["models"]
    assert [model["name"] for model in answered] == [tiny.MOE.name, "Q4_K.gguf"]
    text = html.unescape((tmp_path / "report.html").read_text())
    for words in ("piqa_local", "plans at every size", "Q4_K_M", "cores", "quantkit "):
        assert words in text, words
    asked = CliRunner().invoke(main, ["eval", *command[1:3], "--tasks", "piqa_local", "-o", "answers.json"])
    assert asked.exit_code == 0, asked.output
    shown = CliRunner().invoke(main, [*command, "--results", "answers.json", "-o", "other.html"])
    assert shown.exit_code == 0 and "piqa_local" in shown.output, shown.output
    assert "piqa_local" in (tmp_path / "other.html").read_text()

    (tmp_path / "other.json").write_text(replace(sweep, model="another").to_json())
    (tmp_path / "broken.json").write_text(sweep.to_json().replace('"kind": "stock"', '"kind": 7'))
    other = ["compare", str(files / "Q2_K.gguf"), str(files / "Q4_K.gguf"), "--limit", "512"]
    for arguments, words in (
        ([*command, "--sweep", "other.json"], "the sweep is one of another"),
        ([*command, "--sweep", "broken.json"], "is damaged (the sweep, points, kind is 7)"),
        ([*command, "--sweep", "answers.json"], "is no sweep of this version"),
        ([*command, "--results", "sweep.json"], "holds no results"),
        ([*other, "--results", "answers.json"], "the results are of"),
        ([*command, "--results", "answers.json", "--tasks", "piqa_local"], "give one of the two"),
        ([*command, "--tasks", "piqa_lokal"], "piqa_local"),
    ):
        refused = CliRunner().invoke(main, arguments)
        assert refused.exit_code == 1 and words in " ".join(refused.output.split()), refused.output


def test_same_names_stay_apart_and_the_original_does_not_praise_itself(files, tmp_path):
    """Two files of one name in two folders, and the original as a candidate."""
    for folder, source in (("one", "Q8_0"), ("two", "Q2_K")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.gguf").write_bytes((files / f"{source}.gguf").read_bytes())
    paths = [tmp_path / "one" / "x.gguf", tmp_path / "two" / "x.gguf", tiny.MOE]
    arguments = ["compare", str(tiny.MOE), *map(str, paths), "--limit", "512", "--prompt", "Once", "-o", str(tmp_path / "r.html")]
    said = CliRunner().invoke(main, [*arguments, "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    names = ["one/x.gguf", "two/x.gguf", f"{tiny.MOE.name} (2)"]
    assert [c["name"] for c in found["candidates"]] == names
    assert [t["model"] for t in found["continued"]] == [tiny.MOE.name, *names]
    text = (tmp_path / "r.html").read_text()
    assert "Of 2 candidates one/x.gguf stays" in text and all(html.escape(name) in text for name in names)


def test_mistakes_are_found_before_tasks_and_prompts_are_run(files, tmp_path, monkeypatch):
    kept = tmp_path / "original.kept"
    made = ["compare", str(tiny.MOE), str(files / "Q8_0.gguf"), "--limit", "512", "--cache", str(kept)]
    assert CliRunner().invoke(main, made).exit_code == 0
    monkeypatch.setattr("quantkit.cli.compare._answers", lambda *a, **k: pytest.fail("asked too early"))
    (tmp_path / "short.txt").write_text("Too short.")
    good, tasks = str(files / "Q8_0.gguf"), ["--tasks", "piqa_local"]
    for arguments, words in (
        ([str(tiny.MOE), good, *tasks, "-o", "report.txt"], "end it in .html"),
        ([str(tiny.MOE), good, *tasks, "--text", "nothing.txt"], "nothing.txt does not exist"),
        ([str(tiny.MOE), "nothing.gguf", *tasks], "nothing.gguf does not exist"),
        ([str(kept), good, *tasks], "it cannot answer or write"),
        ([str(kept), good, "--prompt", "Once"], "it cannot answer or write"),
    ):
        refused = CliRunner().invoke(main, ["compare", *arguments])
        assert refused.exit_code == 1 and words in " ".join(refused.output.split()), refused.output
    with pytest.raises(CalibrationError, match=r"short\.txt has fewer than 512 tokens"):
        compare(tiny.MOE, [files / "Q8_0.gguf"], [*default_texts(), tmp_path / "short.txt"])
    with pytest.raises(CheckpointError, match=r"was kept of torch, the candidates would be run by llama; use --runtime torch"):
        compare(kept, [files / "Q8_0.gguf"], [], runtime="llama")


def test_a_candidate_beyond_all_bounds_is_a_row_like_any_other(files):
    """Perplexities that no number holds are infinite in Python and null in JSON, which no reader refuses."""
    report = compare(tiny.MOE, [files / "Q8_0.gguf"], default_texts(), limit=512)
    scores = TokenScores(*(np.full(4, x, np.float32) for x in (900.0, -900.0, -1.0)), np.zeros(4, bool))
    report.candidates[0].divergence = summarize(scores)
    assert report.candidates[0].divergence.perplexity == float("inf")
    document = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert document["candidates"][0]["divergence"]["perplexity_ratio"] is None
    assert "inf" in render_html(report)
