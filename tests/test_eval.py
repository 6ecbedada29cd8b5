"""lm-eval: the scores of its own class for transformers, tasks without a hub, models side by side, killed runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quantkit.checkpoint import open_checkpoint
from quantkit.cli.eval import command
from quantkit.errors import CalibrationError, CheckpointError, MissingDependencyError, QuantkitError
from quantkit.evaluation.generate import Sampling
from quantkit.evaluation.lm_eval import run as lm_eval_run
from quantkit.evaluation.lm_eval import tasks as lm_eval_tasks
from quantkit.evaluation.lm_eval.__main__ import register
from quantkit.evaluation.lm_eval.documents import TASKS, arc, data_folder, gsm8k, piqa, wikitext, wikitext_stream
from quantkit.evaluation.lm_eval.draws import NUMBER, Draw, Drawer, cut, numbered
from quantkit.evaluation.lm_eval.engines import Group, TorchEngine
from quantkit.evaluation.lm_eval.flips import changed
from quantkit.evaluation.lm_eval.plugin_model import QuantkitLM
from quantkit.evaluation.lm_eval.results import Item, TaskScores, read_results
from quantkit.evaluation.lm_eval.rows import LOGITS, batches, row_of
from quantkit.evaluation.lm_eval.run import Options, Served, evaluate_models
from quantkit.evaluation.lm_eval.samples import TEMPERATURE, Draws, ask_often, judge, verdict_of, with_groups
from quantkit.evaluation.lm_eval.tasks import load_tasks
from quantkit.evaluation.lm_eval.words import excerpt, words_of

QUESTION = "Question: Which of these is a mineral that people and other animals often eat?\nAnswer:"
OTHER = "Question: Who goes to the park in the morning, and with whom?\nAnswer:"
ANSWERS = (" salt", " wood from the trees", " iron ore and a lot of water", " x", " y")
PAIRS = [
    *((QUESTION, answer) for answer in ANSWERS), (OTHER, " Tom"), (OTHER, " Tom and his dog"), ("", "The cat sleeps."), ("", "The cat sleep."),
    ("Once upon a time ", "there was"), ("Hi", " you"), ("<|bos|>Hi", " there"), ("long " * 700, "end of it"),
]  # fmt: skip
TEXTS = ["Once there was a king who had a dog. " * 120, "A short text.", "Tom"]
PROMPTS = ["Once upon a time", "The little dog went", QUESTION, "a " * 600]
OFFLINE = [
    "arc_easy_local",
    "arc_challenge_local",
    "piqa_local",
    "blimp_local",
    "gsm8k_local",
    "wikitext_local",
    "wikitext_windows_local",
]


def ask(kind, *arguments):
    return [Instance(kind, {}, given if isinstance(given, tuple) else (given,), 0, ("test", 0, 1)) for given in arguments]


def generations(count=24):
    return ask("generate_until", *((p, {"until": ["\n\n", "!"], "max_gen_toks": count, "do_sample": False}) for p in PROMPTS))


@pytest.fixture(scope="module")
def own(tiny_folder):
    """lm-eval's own answers about the tiny Llama, to log-likelihoods, whole texts and prompts."""
    hf = HFLM(str(tiny_folder("llama")), dtype="float32", device="cpu", batch_size=1)
    greedy = [(prompt, text) for prompt, text in zip(PROMPTS, hf.generate_until(generations(3), True), strict=True) if text]
    pairs = PAIRS + greedy
    return (
        pairs,
        hf.loglikelihood(ask("l", *pairs), True),
        hf.loglikelihood_rolling(ask("r", *TEXTS), True),
        hf.generate_until(generations(), True),
    )


def check_answers(lm, own, tolerance):
    """Every item: tolerance relative to its log-likelihood; greedy or not, and texts, the same."""
    pairs, scores, texts, generated = own
    for (pair, (theirs, greedy)), (ours, said) in zip(
        zip(pairs, scores, strict=True), lm.loglikelihood(ask("l", *pairs)), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance) and said == greedy, pair
    assert lm.loglikelihood_rolling(ask("r", *TEXTS)) == pytest.approx(texts, rel=tolerance)
    assert lm.generate_until(generations()) == generated
    assert any(greedy for _, greedy in scores) and not all(greedy for _, greedy in scores) and any(generated)


@pytest.mark.parametrize("batch", [1, 16])
def test_scores_of_a_folder_are_those_of_lm_evals_own_type(tiny_folder, own, batch):
    check_answers(QuantkitLM(str(tiny_folder("llama")), batch_size=batch), own, 1e-5)


def test_scores_of_a_gguf_are_those_of_its_folder(tiny_gguf, own):
    check_answers(QuantkitLM(str(tiny_gguf("llama", "F32"))), own, 1e-5)


def test_llama_cpp_gives_the_same_scores_and_texts(tiny_gguf, own):
    llama_cpp()
    lm = QuantkitLM(str(tiny_gguf("llama", "F32")), runtime="llama")
    check_answers(lm, own, 1e-3)
    lm.close()


def llama_cpp():
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        oracle.missing("llama-cpp-python")


def test_experts_and_packed_weights_are_scored(tiny_folder, tiny_gguf):
    hf = HFLM(str(tiny_folder("qwen2_moe")), dtype="float32", device="cpu", batch_size=1)
    exact = hf.loglikelihood(ask("l", *PAIRS), True)
    assert_close(QuantkitLM(str(tiny_folder("qwen2_moe"))).loglikelihood(ask("l", *PAIRS)), exact, 1e-5)
    file = str(tiny_gguf("qwen2_moe", "Q8_0"))
    decoded, packed = (QuantkitLM(file, packed=packed).loglikelihood(ask("l", *PAIRS)) for packed in (False, True))
    assert_close(packed, decoded, 1e-4)
    assert_close(decoded, exact, 0.1)
    assert max(abs(a[0] - b[0]) for a, b in zip(decoded, exact, strict=True)) > 1e-3


def assert_close(ours, theirs, tolerance):
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def test_a_shared_context_is_read_once_and_changes_no_score(tiny_folder, monkeypatch):
    fed = []
    before = TorchEngine._hidden
    monkeypatch.setattr(
        TorchEngine, "_hidden", lambda self, ids, **options: fed.append(ids.shape) or before(self, ids, **options)
    )
    scores, shapes = [], []
    for shared in (True, False):
        lm = QuantkitLM(str(tiny_folder("llama")), prefix_cache=shared)
        scores.append(lm.loglikelihood(ask("l", *((QUESTION, answer) for answer in ANSWERS))))
        shapes.append([tuple(shape) for shape in fed])
        fed.clear()
    assert_close(scores[0], scores[1], 1e-5)
    context = len(lm.tok_encode(QUESTION))
    assert shapes[0][0] == (1, context) and len(shapes[0]) == 2 and shapes[0][1][1] < context
    assert len(shapes[1]) == 1 and shapes[1][0][0] > 2 and shapes[1][0][1] > context
    single = [answer for answer in (" a", " b", " c", " d") if len(lm._encode_pair(QUESTION, answer)[1]) == 1]
    lm.loglikelihood(ask("l", *((QUESTION, answer) for answer in single)))
    assert len(single) > 1 and [tuple(shape) for shape in fed] == [(1, context)]  # answers of one token: no pass of their own


def test_contexts_of_different_lengths_share_where_attention_slides(tmp_path):
    """Padding between context and answer must not push the context out of the window."""
    folder = tiny.build("mistral", tmp_path / "model", sliding_window=20)
    pairs = [
        (context, answer)
        for context in (QUESTION, OTHER, "One two three four five six seven eight nine")
        for answer in ANSWERS[:3]
    ]
    hf = HFLM(str(folder), dtype="float32", device="cpu", batch_size=1)
    assert_close(QuantkitLM(str(folder)).loglikelihood(ask("l", *pairs)), hf.loglikelihood(ask("l", *pairs), True), 1e-5)


def test_rows_are_cut_from_the_left_and_batched_within_limits():
    row = row_of(0, range(20), [30, 31, 32], window=10)
    assert row.context == tuple(range(12, 20)) and row.targets == (30, 31, 32) and row.tail == (30, 31)
    with pytest.raises(CalibrationError, match="an answer has 11 tokens, the window 10"):
        row_of(0, [1], [2] * 11, window=10)
    with pytest.raises(CalibrationError, match="no tokens"):
        row_of(0, [1], [], window=10)
    rows = [row_of(i, [1] * (9 + i // 4), [i, i + 1], window=99) for i in range(12)] + [row_of(12, [1] * 9, [50], window=99)]
    found = list(batches(rows, 6, 1000))
    assert sorted(r.place for b in found for owners in b.rows for tied in owners for r in tied) == list(range(13))
    assert max(sum(len(group.tails) for group in batch.groups) for batch in found) <= 6
    assert [group.longest for group in found[0].groups] == sorted((g.longest for g in found[0].groups), reverse=True)
    assert all(len(batch.groups) == 1 for batch in batches(rows, 6, LOGITS))
    same = list(batches([row_of(0, [1] * 9, [5, 6], 99), row_of(1, [1] * 9, [5, 7], 99)], 6, 1000))
    assert same[0].groups == (Group((1,) * 9, ((5,),)),) and len(same[0].rows[0][0]) == 2


def test_requests_that_do_not_fit_are_counted_or_refused(tiny_folder):
    lm = QuantkitLM(str(tiny_folder("llama")), window=64)
    lm.loglikelihood(ask("l", ("word " * 80, " end"), ("short", " end")))
    assert lm.truncated == 1
    lm.generate_until(ask("g", ("word " * 80, {"until": ["!"], "max_gen_toks": 4}), ("a", {"until": ["!"], "max_gen_toks": 4})))
    assert lm.truncated == 2
    with pytest.raises(CalibrationError, match=r"generates up to 64 tokens, the window has 64.*raise --window"):
        lm.generate_until(ask("g", ("a", {"until": ["!"], "max_gen_toks": 64})))
    with pytest.raises(CalibrationError, match="windows of 128 tokens exceed"):
        lm.loglikelihood_windows(ask("w", ("a " * 500, {"window": 128})))
    with pytest.raises(CalibrationError, match="fewer than 64 tokens"):
        lm.loglikelihood_windows(ask("w", ("a", {"window": 64})))


def test_a_model_that_cannot_be_used_is_refused(tiny_folder, tmp_path):
    for given, match in (({"runtime": "onnx"}, "no runtime 'onnx'"), ({"dtype": "int8"}, "no type 'int8'")):
        with pytest.raises(QuantkitError, match=match):
            QuantkitLM(str(tiny_folder("llama")), **given)
    with pytest.raises(CheckpointError):
        QuantkitLM(str(tmp_path / "nothing"))


def test_questions_go_into_the_chat_template_as_with_lm_evals_own_type(tiny_folder, tiny_gguf):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]
    hf = HFLM(str(tiny_folder("llama")), dtype="float32", device="cpu")
    for path in (tiny_folder("llama"), tiny_gguf("llama", "F32")):
        lm = QuantkitLM(str(path))
        assert lm.apply_chat_template(messages) == hf.apply_chat_template(messages)
        assert lm.chat_template(True) == hf.chat_template(True) and path.name in lm.tokenizer_name


@pytest.mark.parametrize(("local", "original"), [
    ("arc_easy_local", "arc/arc_easy"), ("arc_challenge_local", "arc/arc_challenge"), ("piqa_local", "piqa/piqa"),
    ("gsm8k_local", "gsm8k/gsm8k"), ("wikitext_local", "wikitext/wikitext"), ("blimp_passive_1_local", "blimp/passive_1"),
])  # fmt: skip
def test_offline_tasks_ask_as_lm_evals_own(local, original):
    """All fields that shape prompts, answers and metrics; what differs is where documents come from."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    ours, theirs = (
        load_yaml(path, resolve_func=False)
        for path in (next(TASKS.rglob(f"{local}.yaml")), Path(lm_eval.tasks.__file__).parent / f"{original}.yaml")
    )
    skipped = {"task", "tag", "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata", "should_decontaminate",
               "doc_to_decontamination_query", "training_split", "validation_split", "test_split"}  # fmt: skip
    if local == "wikitext_local":  # functions go by their names; the rest are defaults of lm-eval, spelled out
        assert [m["metric"] for m in ours.pop("metric_list")] == [m["metric"] for m in theirs.pop("metric_list")]
        for key in ("doc_to_target", "process_results"):
            assert ours.pop(key).rpartition(".")[2] == theirs.pop(key).rpartition(".")[2]
        assert ours.pop("num_fewshot") == 0
    assert {k: v for k, v in ours.items() if k not in skipped} == {k: v for k, v in theirs.items() if k not in skipped}
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]


def test_every_offline_task_loads_without_a_hub_by_include_path():
    """As lm-eval's own command line does it; with the documents of the package, which stay small."""
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": "sample", "path": "a model's argument"}
    )
    found = manager.load(OFFLINE)
    assert set(OFFLINE) <= {*found["tasks"], *found["groups"]} and len(found["groups"]["blimp_local"].child_names) == 17
    assert set(manager.all_tasks) == {*found["tasks"], *found["groups"]}
    for task in found["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(1)
        task.build_all_requests(limit=2)
    texts = [i.args for i in found["tasks"]["arc_easy_local"].instances[:4]]
    assert {context for context, _ in texts} == {f"Question: {arc('easy', 'sample')['test'][0]['question']}\nAnswer:"}
    assert [answer for _, answer in texts] == [f" {choice}" for choice in arc("easy", "sample")["test"][0]["choices"]["text"]]
    assert sum(path.stat().st_size for path in (TASKS / "sample").rglob("*") if path.is_file()) < 100_000


def test_documents_have_the_fields_of_the_originals():
    found = arc("challenge", "sample")["test"][0]
    assert found["answerKey"] in found["choices"]["label"] and len(found["choices"]["label"]) == len(found["choices"]["text"])
    assert (
        set(piqa("sample")["validation"][0]) == {"goal", "sol1", "sol2", "label"}
        and "####" in gsm8k("sample")["train"][0]["answer"]
    )
    (page,) = (row["page"] for row in wikitext("sample")["test"])
    assert page.startswith(" = Robert Boulter = \n") and " = = Career = = " in page
    assert wikitext_stream("sample")["test"][0]["text"].startswith(" \n = Robert Boulter")


def test_articles_are_cut_at_their_titles(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    text = " \n = One = \n \n Words . \n = = Part = = \n x = 2 = \n = Two ( a = b ) = \n More . \n"
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(text)
    pages = [row["page"] for row in wikitext(tmp_path)["test"]]
    assert len(pages) == 2 and pages[1].startswith(" = Two") and " \n" + "\n".join(pages) == text
    assert wikitext_stream(tmp_path)["test"][0]["text"] == text[:-1]


def test_missing_and_damaged_data_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    monkeypatch.setattr("quantkit.evaluation.lm_eval.documents.CHECKOUT", tmp_path / "none")
    with pytest.raises(QuantkitError, match=r"no data; name its folder with --data or \$QUANTKIT_DATA"):
        data_folder()
    monkeypatch.setenv("QUANTKIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(QuantkitError, match=r"cannot read .*arc_easy_train.jsonl: No such file"):
        load_tasks(["arc_easy_local"])
    with pytest.raises(QuantkitError, match="is no folder"):
        data_folder(tmp_path / "missing")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text('{"goal": "a"}\n{"goal"\n')
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(QuantkitError, match=r"valid.jsonl:2 is not JSON"):
        piqa()
    (tmp_path / "piqa" / "valid.jsonl").write_text('{"goal": "a"}\n{"goal": "b"}\n')
    with pytest.raises(QuantkitError, match="2 documents and 1 labels"):
        piqa()


@pytest.fixture(scope="module")
def all_names():
    """lm-eval's index of all tasks, read once: that takes seconds."""
    return lm_eval_tasks._manager(True, {"data": "sample"})


def test_unknown_tasks_name_the_nearest(all_names, monkeypatch):
    with pytest.raises(QuantkitError, match=r"no task 'arc_eazy_local'; the nearest: arc_easy_local"):
        load_tasks(["arc_eazy_local"], "sample")
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda everything, metadata: all_names)
    with pytest.raises(QuantkitError, match=r"no task 'hellaswog'.*hellaswag"):
        load_tasks(["arc_easy_local", "hellaswog"], "sample")


def test_tasks_of_the_hub_say_so_when_they_cannot_be_had(all_names, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda everything, metadata: all_names)
    with pytest.raises(QuantkitError, match=r"task arc_easy cannot be loaded \(.*those of quantkit end in _local"):
        load_tasks(["arc_easy"], "sample")


def test_examples_are_given_where_the_task_lets_them(tmp_path):
    loaded = load_tasks(["piqa_local", "blimp_passive_1_local", "gsm8k_local"], "sample", shots=2)
    assert [task.get_config("num_fewshot") for task in loaded["tasks"].values()] == [2, 0, 2]
    assert [t.get_config("num_fewshot") for t in load_tasks(["piqa_local", "gsm8k_local"], "sample")["tasks"].values()] == [0, 5]


def test_windows_are_scored_like_llama_perplexity(tiny_folder):
    """One stream; each window begins with the beginning-of-text token in place of its own first; its second half counts."""
    folder = tiny_folder("llama")
    lm = QuantkitLM(str(folder))
    text = wikitext_stream("sample")["test"][0]["text"]
    ((first, second),) = lm.loglikelihood_windows(ask("w", (text, {"window": 64, "windows": 2})))
    stream = [lm.encoder.bos, *lm.encoder.encode(text)]
    with torch.inference_mode():
        for start, (score, count) in ((0, first), (64, second)):
            ids = torch.tensor([lm.encoder.bos, *stream[start + 1 : start + 64]])
            logp = lm.model(ids[None]).logits[0].double().log_softmax(-1)
            assert count == 31
            assert score == pytest.approx(sum(float(logp[i, ids[i + 1]]) for i in range(32, 63)), rel=1e-5)


@pytest.fixture(scope="module")
def report(tiny_folder, tiny_gguf, tmp_path_factory):
    """The tiny Llama and its Q4_0 on all offline tasks."""
    options = Options(tasks=OFFLINE, limit=4, data="sample", shots=1, work=tmp_path_factory.mktemp("work"))
    return evaluate_models([tiny_folder("llama"), tiny_gguf("llama", "Q4_0")], options)


def test_models_stand_side_by_side(report, tiny_folder):
    original, candidate = report.models
    assert report.tasks == tuple(OFFLINE) and list(original.results) == list(candidate.results) and original.truncated
    assert original.identity == open_checkpoint(tiny_folder("llama")).identity != candidate.identity
    assert original.file_bytes > candidate.file_bytes > 0 and original.window == 512
    for name in ("arc_easy_local", "piqa_local"):
        ours, theirs = original.results[name], candidate.results[name]
        assert [item.hash for item in ours.items] == [item.hash for item in theirs.items] and len(
            {i.hash for i in ours.items}
        ) == 4
        assert ours.documents == 4 and ours.shots == 1
        for item in ours.items:
            assert item.scores["acc"] == float(item.chosen == item.target) and len(item.greedy) == len(item.loglikelihoods) > 1
        score = next(score for score in ours.scores if score.name == "acc")
        assert (
            score.value == sum(item.scores["acc"] for item in ours.items) / 4 and score.unit == "share" and score.higher_is_better
        )
    assert (
        original.results["arc_easy_local"].items[0].loglikelihoods != candidate.results["arc_easy_local"].items[0].loglikelihoods
    )
    group = original.results["blimp_local"]
    assert len(group.members) == 17 and group.documents == 34 and not group.items
    assert group.scores[0].value == pytest.approx(sum(original.results[name].scores[0].value for name in group.members) / 17)


def test_generated_answers_and_perplexities_are_kept_with_their_errors(report):
    results = report.models[0].results
    answers = results["gsm8k_local"].items
    assert len(answers) == 4 and all(isinstance(item.text, str) for item in answers)
    assert set(answers[0].scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    (windows,) = results["wikitext_windows_local"].items
    score, count = windows.scores["perplexity"]
    (perplexity,) = results["wikitext_windows_local"].scores
    windows_of_text = len(windows.loglikelihoods)
    assert count == 255 * windows_of_text > 255 and score == pytest.approx(sum(windows.loglikelihoods))
    assert perplexity.value == pytest.approx(math.exp(-score / count)) and perplexity.unit == "per token"
    spread = torch.tensor(windows.loglikelihoods, dtype=torch.float64).div(255).std() / windows_of_text**0.5
    assert perplexity.stderr == pytest.approx(perplexity.value * float(spread), rel=1e-6)
    whole = {score.name: score for score in results["wikitext_local"].scores}
    assert whole["bits_per_byte"].unit == "bits per byte" and whole["word_perplexity"].stderr is None  # a single article


def test_results_are_read_back_and_damage_is_refused(report, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(report.to_json())
    assert read_results(path) == report
    short = json.loads(report.to_json(items=False))
    assert (
        "items" not in short["models"][0]["results"]["arc_easy_local"]
        and short["models"][0]["results"]["arc_easy_local"]["scores"]
    )
    del short["models"][0]["window"]
    for document, match in ((short, "is damaged"), ({"quantkit_report": 1}, "holds no results")):
        path.write_text(json.dumps(document))
        with pytest.raises(QuantkitError, match=match):
            read_results(path)


def test_a_killed_run_goes_on_where_it_was(tiny_folder, tmp_path, monkeypatch):
    """The first run dies in the middle of each kind of request; the second asks only what is missing."""
    calls, before = [], TorchEngine._hidden

    def counted(stop_after):
        def hidden(self, ids, **options):
            calls.append(len(ids))
            if len(calls) > stop_after:
                raise KeyboardInterrupt
            return before(self, ids, **options)

        return hidden

    def run(work, stop_after):
        calls.clear()
        monkeypatch.setattr(TorchEngine, "_hidden", counted(stop_after))
        return evaluate_models(
            [tiny_folder("llama")], Options(tasks=tasks, limit=4, data="sample", batch=2, work=tmp_path / work)
        )

    for tasks in (["arc_easy_local"], ["wikitext_windows_local"]):
        whole = run(f"whole-{tasks[0]}", 1000)
        needed = len(calls)
        with pytest.raises(KeyboardInterrupt):
            run(tasks[0], needed // 2)
        second = run(tasks[0], 1000)
        assert 0 < len(calls) < needed
        assert second.models[0].results[tasks[0]].scores == pytest.approx(whole.models[0].results[tasks[0]].scores)
        run(tasks[0], 0)  # now everything is known
        assert not calls


def test_fresh_asks_again_and_another_window_is_another_model(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    for given in ({}, {}, {"fresh": True}, {"window": 256}):
        evaluate_models([folder], Options(tasks=["piqa_local"], limit=2, data="sample", work=tmp_path, **given))
    assert len(list((tmp_path / "eval").glob("*.db"))) == 2


def test_generated_text_is_as_long_for_every_model(tiny_folder, tiny_gguf, tmp_path, monkeypatch):
    """transformers lets a folder's generation_config.json go before a task's limit; a GGUF has none."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "eos_token_id": 1, "pad_token_id": 2}))
    lengths = []
    before = QuantkitLM._model_generate

    def generate(self, context, *arguments, **options):
        out = before(self, context, *arguments, **options)
        lengths.append(out.shape[1] - context.shape[1])
        return out

    monkeypatch.setattr(QuantkitLM, "_model_generate", generate)
    evaluate_models(
        [folder, tiny_gguf("llama", "F32")], Options(tasks=["gsm8k_local"], limit=2, data="sample", work=tmp_path / "work")
    )
    assert len(lengths) == 2 and max(lengths) == 5


class Completions(BaseHTTPRequestHandler):
    """What vLLM answers to a request for a prompt's log-probabilities, or for a greedy continuation."""

    lm: QuantkitLM

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with torch.inference_mode():
            choices = [self.choice(i, ids, given) for i, ids in enumerate(given["prompt"])]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def choice(self, index, ids, given):
        logp = self.lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        token = [None, *(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1)), 0.0]
        top = [None, *({"top": float(row.max())} for row in logp[:-1]), {"top": 0.0}]
        return {"index": index, "text": "", "logprobs": {"token_logprobs": token, "top_logprobs": top}}

    def log_message(self, *ignored):
        pass


@pytest.fixture
def endpoint(tiny_folder):
    Completions.lm = QuantkitLM(str(tiny_folder("llama")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_served_model_stands_in_the_same_table(tiny_folder, endpoint, tmp_path):
    options = Options(tasks=["arc_easy_local", "wikitext_windows_local"], limit=3, data="sample", work=tmp_path)
    report = evaluate_models([tiny_folder("llama")], options, [Served.parse(f"{endpoint}/v1=some/model")])
    local, served = report.models
    assert (served.name, served.runtime, served.file_bytes) == ("some/model", "served", None)
    for ours, theirs in zip(local.results["arc_easy_local"].items, served.results["arc_easy_local"].items, strict=True):
        assert theirs.loglikelihoods == pytest.approx(ours.loglikelihoods, rel=1e-4) and theirs.hash == ours.hash
    assert "wikitext_windows_local" in local.results and "wikitext_windows_local" not in served.results


def test_an_endpoint_that_does_not_answer_is_an_error_with_a_way_out(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.models.api_models.stop_after_attempt", lambda count: lambda state: True)
    options = Options(tasks=["piqa_local"], limit=1, data="sample", work=tmp_path, batch=1)
    with pytest.raises(QuantkitError, match=r"127.0.0.1:9 does not answer as needed \(Connection"):
        evaluate_models([tiny_folder("llama")], options, [Served("http://127.0.0.1:9", "m")])
    for text in ("localhost=m", "http://localhost", "http://localhost="):
        with pytest.raises(QuantkitError, match="is not URL=MODEL"):
            Served.parse(text)
    assert Served.parse("http://h/v1/completions=m").completions == Served.parse("http://h=m").completions


def test_the_command_prints_a_table_or_one_document_and_writes_results(tiny_folder, tiny_gguf, tmp_path):
    models = [str(tiny_folder("llama")), str(tiny_gguf("llama", "Q4_0"))]
    common = [
        "--tasks",
        "piqa_local, wikitext_windows_local",
        "--data",
        "sample",
        "--limit",
        "2",
        "--work",
        str(tmp_path / "work"),
    ]

    def call(*arguments):
        return CliRunner().invoke(command, [*models, *common, *arguments])

    output = tmp_path / "results.json"
    table = call("-o", str(output))
    assert table.exit_code == 0, table.stderr
    assert (
        "piqa_local" in table.stdout
        and "llama-Q4_0.gguf" in table.stdout
        and "(+0.00)" in table.stdout
        and "per token" in table.stdout
    )
    assert len(read_results(output).models[1].results["piqa_local"].items) == 2
    facts = json.loads(call("--json").stdout)
    assert facts["quantkit_eval"] == 1 and [model["name"] for model in facts["models"]] == ["llama", "llama-Q4_0.gguf"]
    assert "items" not in facts["models"][0]["results"]["piqa_local"]
    again = call("-o", str(output))
    assert again.exit_code == 1 and "exists" in again.stderr and "--force" in again.stderr
    assert call("-o", str(output), "--force").exit_code == 0


def test_mistakes_are_one_line_without_a_file(tiny_folder, tmp_path, monkeypatch):
    model, output = str(tiny_folder("llama")), tmp_path / "results.json"

    def call(*arguments):
        out = CliRunner().invoke(command, [*arguments, "--data", "sample", "--work", str(tmp_path / "work"), "-o", str(output)])
        line = out.stderr.splitlines()[-1]  # before it, bars of a library that other tests have imported
        assert out.exit_code == 1 and line.startswith("error: ") and "internal" not in line and not output.exists(), out.stderr
        return line

    assert "the nearest: piqa_local" in call(model, "--tasks", "pica_local")
    assert "cannot work on cuda:9" in call(model, "--tasks", "piqa_local", "--device", "cuda:9")
    assert "nothing.gguf" in call(model, str(tmp_path / "nothing.gguf"), "--tasks", "piqa_local")
    assert "raise --window" in call(model, "--tasks", "gsm8k_local", "--window", "128")
    shutil.copytree(tiny_folder("llama"), tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    config = tmp_path / "plain" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    assert "plain has no chat template" in call(str(tmp_path / "plain"), "--tasks", "piqa_local", "--chat")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert '".[eval]"' in call(model, "--tasks", "piqa_local")
    with pytest.raises(MissingDependencyError, match="lm-eval"):
        load_tasks(["piqa_local"])


def test_questions_can_be_asked_in_the_chat_template(tiny_folder, tmp_path):
    plain, chat = (
        evaluate_models([tiny_folder("llama")], Options(tasks=["piqa_local"], limit=2, data="sample", work=tmp_path, chat=chat))
        for chat in (False, True)
    )
    assert chat.chat and plain.models[0].results["piqa_local"].items != chat.models[0].results["piqa_local"].items


def test_lm_eval_knows_the_type(tiny_gguf, tiny_folder, monkeypatch):
    """As its command line calls it: arguments as text, its own device."""
    from lm_eval import evaluator

    register()
    register()
    for slow in ("add_env_info", "get_git_commit_hash"):
        monkeypatch.setattr(evaluator, slow, lambda *given: "")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": "sample"})
    scores = []
    for kind, given in (
        ("quantkit", f"path={tiny_gguf('llama', 'F32')},window=256"),
        ("hf", f"pretrained={tiny_folder('llama')},dtype=float32"),
    ):
        out = evaluator.simple_evaluate(
            kind, given, ["piqa_local", "wikitext_local"], batch_size=2, device="cpu", limit=4, task_manager=manager
        )
        scores.append(out["results"]["piqa_local"]["acc_norm,none"])
        assert kind == "hf" or (out["config"]["model_window"] == 256 and out["config"]["model_runtime"] == "torch")
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_type(tiny_gguf):
    arguments = ["--model", "quantkit", "--model_args", f"path={tiny_gguf('llama', 'F32')},window=256", "--tasks", "piqa_local",
                 "--limit", "2", "--metadata", "data=sample"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "quantkit.evaluation.lm_eval", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "|piqa_local|" in done.stdout.replace(" ", ""), done.stderr[-2000:]


def test_models_are_looked_at_before_the_first_is_asked(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval_run, "_model", lambda *given: pytest.fail("asked too early"))
    with pytest.raises(CheckpointError):
        evaluate_models([tiny_folder("llama"), tmp_path / "missing.gguf"], Options(tasks=["piqa_local"], data="sample"))
    with pytest.raises(QuantkitError, match="no model"):
        evaluate_models([], Options(tasks=["piqa_local"], data="sample"))


LETTERS = """
task: letters
custom_dataset: !function letters_data.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false, top_k: 1}
filter_list:
  - name: letter
    filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]
metadata: {version: 1.0}
"""
LETTERS_DATA = """
def documents(**given):
    from datasets import Dataset

    asked = ("Once upon a time", "The little dog went", "He said that", "She")
    return {"test": Dataset.from_list([{"question": text, "answer": "e"} for text in asked])}
"""
EIGHT = {"samples": 8, "seed": 3}


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A task that a tiny model sometimes gets right: the first small letter of six tokens should be an e."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "letters_data.py").write_text(LETTERS_DATA)
    (folder / "letters.yaml").write_text(LETTERS)
    return str(folder / "letters.yaml")


def drawn(monkeypatch, task, models, work, **options):
    """(report, texts of each model: four questions of eight answers), with every text that a model gave."""
    said, before = [], QuantkitLM.generate_until
    monkeypatch.setattr(
        QuantkitLM, "generate_until", lambda self, requests, *given: said.append(before(self, requests, *given)) or said[-1]
    )
    report = evaluate_models(models, Options(tasks=[task], work=work, **{**EIGHT, **options}))
    monkeypatch.setattr(QuantkitLM, "generate_until", before)
    return report, [[texts[start : start + 8] for start in range(0, len(texts), 8)] for texts in said]


def test_several_answers_are_counted_as_by_hand(tiny_folder, letters, tmp_path, monkeypatch):
    report, ((*texts,),) = drawn(monkeypatch, letters, [tiny_folder("llama")], tmp_path)
    assert len(texts) == 4 and all(len(set(some)) > 4 for some in texts)  # not the same answer eight times
    found = report.models[0].results["letters"]
    first = [[match[0] if (match := re.search("[a-z]", text)) else None for text in some] for some in texts]
    right = [some.count("e") for some in first]
    assert [item.right for item in found.items] == [{"exact_match,letter": count} for count in right] and 0 < sum(right) < 32
    assert all(item.samples == 8 for item in found.items) and report.samples == 8 and report.temperature == TEMPERATURE
    for k in (1, 2, 4, 8):
        values = [1 - math.comb(8 - count, k) / math.comb(8, k) for count in right]
        score = next(score for score in found.scores if score.name == f"pass@{k},letter")
        assert score.value == pytest.approx(np.mean(values)) and score.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert [score.name for score in found.scores] == [
        f"{n},letter" for n in ("pass@1", "pass@2", "pass@4", "pass@8", "majority@8")
    ]
    votes = [max({letter: some.count(letter) for letter in some if letter}.values(), default=0) for some in first]
    for item, some, most in zip(found.items, first, votes, strict=True):
        leaders = {letter for letter in some if letter and some.count(letter) == most}
        assert item.scores["majority@8,letter"] == pytest.approx(("e" in leaders) / max(len(leaders), 1))


def test_answers_are_the_same_again_in_other_batches_and_for_the_same_model(
    tiny_folder, tiny_gguf, letters, tmp_path, monkeypatch
):
    folder = tiny_folder("llama")
    _, (here, there) = drawn(monkeypatch, letters, [folder, tiny_gguf("llama", "F32")], tmp_path / "a")
    assert here == there
    assert drawn(monkeypatch, letters, [folder], tmp_path / "b", batch=3)[1] == [here]
    other, hot = (
        drawn(monkeypatch, letters, [folder], tmp_path / "a", **given)[1] for given in ({"seed": 4}, {"temperature": 9.0})
    )
    assert other != [here] and hot != [here]


def test_llama_cpp_draws_the_same_answers(tiny_gguf, letters, tmp_path, monkeypatch):
    llama_cpp()
    files = [tiny_gguf("llama", "F32")]
    texts = [drawn(monkeypatch, letters, files, tmp_path, runtime=runtime)[1] for runtime in ("torch", "llama")]
    assert texts[0] == texts[1]


def test_answers_that_were_drawn_are_not_drawn_again(tiny_folder, letters, tmp_path, monkeypatch):
    """A killed run goes on; a finished one asks the model nothing, and keeps all answers apart."""
    passes, before = [], QuantkitLM._model_generate

    def dying(stop_after):
        def generate(self, context, *given, **options):
            passes.append(len(context))
            if len(passes) > stop_after:
                raise KeyboardInterrupt
            return before(self, context, *given, **options)

        return generate

    def run(stop_after):
        passes.clear()
        monkeypatch.setattr(QuantkitLM, "_model_generate", dying(stop_after))
        return drawn(monkeypatch, letters, [tiny_folder("llama")], tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(3)
    _, texts = run(100)
    assert sum(passes) == 32 - 12  # four questions in each of three passes were kept
    monkeypatch.setattr(QuantkitLM, "generate_until", QuantkitLM.generate_until)
    report, again = run(0)
    assert not passes and again == texts and report.models[0].results["letters"].items[0].samples == 8


def test_other_tasks_are_asked_as_ever_and_some_task_must_be_checkable(tiny_folder, letters, tmp_path):
    model = [tiny_folder("llama")]
    plain, both = (
        evaluate_models(model, Options(tasks=tasks, limit=2, data="sample", work=tmp_path / str(samples), samples=samples))
        for tasks, samples in ((["piqa_local"], 1), (["piqa_local", letters], 2))
    )
    assert both.models[0].results["piqa_local"].scores == plain.models[0].results["piqa_local"].scores
    assert {s.name for s in both.models[0].results["letters"].scores} == {
        f"{n},letter" for n in ("pass@1", "pass@2", "majority@2")
    }
    for given, match in (
        ({"samples": 4}, "no answer of piqa_local can be drawn and checked"),
        ({"temperature": 0.5}, "add --samples"),
        ({"samples": 4, "temperature": 0.0}, "cannot draw 4 answers at temperature 0 with"),
        ({"samples": 4, "temperature": math.nan}, "at temperature nan"),
        ({"samples": 0}, "cannot draw 0 answers"),
    ):
        with pytest.raises(QuantkitError, match=match):
            evaluate_models(model, Options(tasks=["piqa_local"], data="sample", work=tmp_path, **given))
    with pytest.raises(QuantkitError, match="served model with the same seed; leave out --served"):
        evaluate_models(model, Options(tasks=["gsm8k_local"], samples=2), [Served("http://127.0.0.1:9", "m")])


@pytest.fixture
def problems():
    """gsm8k_local, each question asked four times."""
    tasks = load_tasks(["gsm8k_local", "piqa_local"], "sample")["tasks"]
    assert ask_often(tasks, Draws(4)) == ["gsm8k_local"]
    return tasks["gsm8k_local"]


def test_answers_are_judged_one_by_one(problems):
    """1,000 and 1000 are one answer; a text without an answer never wins."""
    doc = {"question": "?", "answer": "Some words\n#### 1,000"}
    texts = ["so #### 1,000", "so #### 1000", "#### 7", "no idea"]
    sample = {"doc": doc, "resps": [texts], "filter": "strict-match"}
    found = judge(problems, sample, ",strict-match", Draws(4))
    assert found.right == {"exact_match,strict-match": 2}
    assert found.scores == {
        "pass@1,strict-match": 0.5, "pass@2,strict-match": pytest.approx(1 - 1 / 6), "pass@4,strict-match": 1.0,
        "majority@4,strict-match": 1.0,
    }  # fmt: skip
    sample["resps"] = [["#### 1,000", "#### 7", "#### 7", "no idea"]]
    assert judge(problems, sample, "", Draws(4)).scores["majority@4"] == 0.0
    sample["resps"] = [["no", "no", "no", "no"]]
    assert judge(problems, sample, "", Draws(4)).scores == {"pass@1": 0.0, "pass@2": 0.0, "pass@4": 0.0, "majority@4": 0.0}


def test_only_filters_that_find_answers_stay(problems):
    """As in lm-eval's task of self-consistency: three filters that find the same and choose differently."""
    from lm_eval.filters import build_filter_ensemble

    find = ("regex", {"regex_pattern": "#### ([0-9]+)"})
    problems._filters = [
        build_filter_ensemble("score-first", [find, ("take_first", None)]),
        build_filter_ensemble("maj@64", [find, ("majority_vote", None), ("take_first", None)]),
        build_filter_ensemble("maj@8", [find, ("take_first_k", {"k": 8}), ("majority_vote", None), ("take_first", None)]),
    ]
    problems.set_config("generation_kwargs", {"until": ["\n\n"], "max_gen_toks": 9, "temperature": 0.2, "top_k": 40})
    ask_often({"problems": problems}, Draws(4, 0.5, 2))
    assert [one.name for one in problems._filters] == ["score-first"]
    given = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.5, "seed": 2}
    assert problems.get_config("generation_kwargs") == given and problems.get_config("repeats") == 4
    assert verdict_of(problems) == "exact_match" and Draws(6).ks == [1, 2, 4] and Draws(8).ks == [1, 2, 4, 8]


def test_a_group_has_the_means_over_all_questions():
    def task(name, *values):
        items = tuple(Item(n, f"h{n}", {"pass@1": v}, samples=2, right={"exact_match": int(2 * v)}) for n, v in enumerate(values))
        return TaskScores(name, 0, "1", len(items), (), items)

    results = {"a": task("a", 1.0), "b": task("b", 0.5, 0.0), "g": TaskScores("g", 0, "1", 3, (), (), ("a", "b"))}
    (score,) = with_groups(results, ["a", "b"])["g"].scores
    assert score.value == pytest.approx(0.5) and score.stderr == pytest.approx(0.5 / math.sqrt(3)) and score.unit == "share"
    assert with_groups(results, [])["g"].scores == ()


def test_tokens_are_drawn_as_often_as_they_should_be():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]]).repeat(4000, 1)
    draws = [Draw(Sampling(0.7, seed=1), number).stream([1, 2]) for number in range(4000)]
    drawn = Drawer(Draw(Sampling(0.7)), draws)(None, logits).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / 4000
    expected = (logits[0] / 0.7).softmax(-1)
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all() and shares[4] == 0


def test_close_models_mostly_say_the_same():
    """With equal noise; independent draws of tokens of this entropy would agree a third of the time."""
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 2
    nearby = logits + 0.05 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))

    def tokens(scores, number=0):
        draw = Draw(Sampling(1.0), number)
        return Drawer(draw, [draw.stream([row]) for row in range(len(scores))])(None, scores).argmax(-1)

    same, others = ((tokens(logits) == tokens(nearby, number)).float().mean() for number in (0, 1))
    assert same > 0.95 and others < 0.4


def test_what_is_cut_off_is_never_drawn():
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    kept = [(cut(scores, Sampling(1.0, *given)) > -torch.inf)[0].tolist() for given in ((2,), (0, 0.6), (0, 0.4), (3, 0.9))]
    assert kept == [
        [False, True, True, False],
        [False, True, True, False],
        [False, True, False, False],
        [True, True, True, False],
    ]
    assert cut(scores, Sampling(1.0)) is scores
    assert Draw.of({"do_sample": True, "num_beams": 1}) == Draw(Sampling(1.0))
    with pytest.raises(QuantkitError, match="draws answers with min_p; temperature, top_k and top_p are known"):
        Draw.of({"do_sample": True, "temperature": 1.0, "min_p": 0.1})


def test_equal_requests_for_random_answers_are_told_apart(tiny_folder):
    """lm-eval's own repeats, without --samples: of a task that draws by itself."""
    hot, cold = {"until": ["!"], "do_sample": True, "temperature": 2.0, "max_gen_toks": 5}, {"until": ["!"], "max_gen_toks": 5}
    asked = [("a", hot), ("a", cold), ("a", hot), ("b", hot), ("a", hot), ("a", cold), ("a", {**hot, "temperature": 0.0})]
    assert [options.get(NUMBER) for _, options in numbered(asked)] == [0, None, 1, 0, 2, None, None]
    texts = QuantkitLM(str(tiny_folder("llama"))).generate_until(ask("g", *asked))
    assert len({texts[0], texts[2], texts[4]}) == 3 and texts[1] == texts[5] == texts[6]


def test_items_say_in_words_what_was_asked_and_answered(report):
    original = report.models[0].results
    asked = arc("easy", "sample")["test"]
    for item, row in zip(original["arc_easy_local"].items, asked, strict=False):
        assert item.question == excerpt(f"Question: {row['question']}\nAnswer:", 200)  # without the example before it
        choices = [excerpt(choice, 160) for choice in row["choices"]["text"]]
        assert item.expected == choices[item.target] and set(item.said) == {"acc", "acc_norm"}
        assert item.said["acc"] == choices[item.chosen]
        for metric, said in item.said.items():
            assert item.scores[metric] == float(said == item.expected)
    pair = original["blimp_passive_1_local"].items[0]
    assert pair.question == "" and pair.expected.endswith(".") and pair.scores["acc"] == float(pair.said["acc"] == pair.expected)
    problem = original["gsm8k_local"].items[0]
    assert problem.question.startswith("Question: ") and len(problem.question) <= 200 and "#### " in problem.expected
    assert set(problem.said) == set(problem.scores) and problem.said["exact_match,strict-match"] == "[invalid]"
    assert not original["wikitext_local"].items[0].question


def test_words_are_one_short_line():
    assert excerpt(" a\n b\tc ", 9) == "a b c" and excerpt("a\x1b[31mb\u202e", 20) == "a\ufffd[31mb\ufffd"
    long = excerpt("start " + "x" * 500 + " end", 50)
    assert len(long) == 50 and long.startswith("start xx") and long.endswith("xx end") and " … " in long
    assert excerpt("one two three four five six", 17) == "one two … ive six"
    assert words_of(None, {}, "").said == {} and words_of(object(), {}, "").question == ""


class Blanks:
    """A task whose choices stand in the middle of a sentence, as in WinoGrande; several may be right."""

    OUTPUT_TYPE, multiple_input = "multiple_choice", 2

    class config:
        doc_to_choice = True

    def doc_to_choice(self, doc):
        return doc["choices"]

    def doc_to_text(self, doc):
        return doc["right"]

    def doc_to_target(self, doc):
        return doc["rest"]


def test_words_of_choices_by_length_and_in_the_middle_of_a_text():
    doc = {"choices": ["The dog because", "The very old cat because"], "right": 1, "rest": "it barked."}
    sample = {
        "doc": doc,
        "target": "it barked.",
        "metrics": ["acc", "acc_norm", "f1"],
        "resps": [[(-3.0, False)], [(-4.0, False)]],
    }
    found = words_of(Blanks(), sample, "")
    assert (found.question, found.expected) == ("it barked.", "The very old cat because")
    assert found.said == {"acc": "The dog because", "acc_norm": "The very old cat because"}  # −3 ÷ 15 is below −4 ÷ 24
    Blanks.multiple_input = 0
    doc["right"] = "What?"
    assert words_of(Blanks(), {**sample, "target": [0, 1]}, "").expected == "The dog because / The very old cat because"


def test_the_command_lists_flips_and_members(report, tiny_folder, monkeypatch):
    """On the answers of the tiny models, some of which the candidate changed."""
    monkeypatch.setattr(lm_eval_run, "evaluate_models", lambda *given: report)

    def call(*arguments):
        out = CliRunner().invoke(command, [str(tiny_folder("llama")), *arguments])
        assert out.exit_code == 0, out.stderr
        return out.stdout

    plain, more = call(), call("--members", "--flips")
    assert "blimp_passive_1_local" not in plain and "right → wrong:" not in plain and "p (Holm)" in plain
    assert "perplexities against llama" in plain and "windows" in plain and "×" in plain
    flipped = next(one for one in changed(report) if one.n_lost + one.n_gained)
    one = (flipped.lost + flipped.gained)[0]
    asked = f": {one.question}" if one.question else ""
    assert f"  {one.task} {one.doc}{asked}\n    right: {one.expected} | llama: {one.before} | " in more
    assert "in the tasks of groups" in more and "blimp_passive_1_local" in more
    facts = json.loads(call("--json", "--members", "--flips"))
    assert {row["task"] for row in facts["paired"]} == set(OFFLINE) and len(
        {row["task"] for row in facts["paired_members"]}
    ) == 17
    ratio = next(row for row in facts["paired"] if row["task"] == "wikitext_windows_local")
    scores = [model.results["wikitext_windows_local"].scores[0].value for model in report.models]
    assert ratio["change"] == pytest.approx(scores[1] / scores[0]) and ratio["over"] == "windows" and ratio["error"] > 0
    assert [row["task"] for row in facts["flips"]] == [one.task for one in changed(report)]
    assert "flips" not in json.loads(call("--json"))


def test_packages_of_a_task_are_named(monkeypatch):
    """Some of lm-eval's tasks need more than lm-eval."""

    def missing(self, names):
        raise ModuleNotFoundError("No module named 'antlr4'", name="antlr4")

    monkeypatch.setattr(TaskManager, "load", missing)
    with pytest.raises(MissingDependencyError, match=r"task piqa_local needs antlr4.*pip install"):
        load_tasks(["piqa_local"], "sample")
