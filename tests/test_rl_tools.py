"""check-rewards, exports that llama.cpp reads, merging, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint, read_adapter
from quantkit.cli import main
from quantkit.errors import AdapterError, CheckpointError, RewardError
from quantkit.evaluation.runners import LlamaRunner
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run
from quantkit.rl import train
from quantkit.rl.advice import advice_for_grpo, advice_for_sft
from quantkit.rl.base import open_base
from quantkit.rl.check_rewards import check_rewards
from quantkit.rl.data import read_rows
from quantkit.rl.export import DecodedView, export_adapter, merge
from quantkit.rl.options import LoraOptions, SftOptions
from quantkit.rl.plugin_peft import with_adapter
from quantkit.rl.rewards import gsm8k_rewards

IDS = np.arange(40, 104)
ROWS = [{"prompt": f"Say {n}.", "completion": f"{n} and {n}"} for n in range(8)]
GOOD = [
    {"prompt": f"{a} + {b}?", "completion": f"I add them.</start_working_out>\n<SOLUTION>{a + b}</SOLUTION>", "answer": str(a + b)}
    for a, b in ((2, 2), (3, 4), (10, 5), (2, 2))
]  # fmt: skip
BAD = [{**row, "completion": row["completion"].replace(row["answer"], "77")} for row in GOOD] + [
    {**GOOD[0], "completion": "Four!"}
]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """(base, run) of a tiny model with an adapter that changes much, by architecture."""
    folder = tmp_path_factory.mktemp("trained")

    def get(name: str, rslora: bool = False) -> tuple[Path, Path]:
        base, out = folder / f"{name}.gguf", folder / f"{name}-{rslora}"
        if not base.exists():
            checkpoint = open_checkpoint(tiny_folder(name))
            run(checkpoint, uniform_plan(checkpoint, "Q4_0", None), base)
        if not out.exists():
            lora = LoraOptions(rank=4, rslora=rslora, experts="moe" in name)
            train.sft(base, ROWS, out, SftOptions(steps=6, batch=8, together=8, learning_rate=3e-2, warmup=0, lora=lora))
        return base, out

    return get


def by_llama(checkpoint) -> np.ndarray:
    runner = LlamaRunner(checkpoint, len(IDS))
    try:
        return runner.logits(IDS).numpy()
    finally:
        runner.close()


def by_torch(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.mark.parametrize("name, rslora", [("llama", False), ("qwen3", True), ("qwen2_moe", False)])
def test_llama_cpp_computes_the_same_with_the_exported_adapter(trained, tmp_path, name, rslora):
    """On the F32 file of the decoded base; q and k in llama.cpp's order, experts, rsLoRA in alpha."""
    path, out = trained(name, rslora)
    base = open_base(path)
    lora = export_adapter(out, base, tmp_path / "adapter.gguf")
    assert lora.alpha == (8 * 2 if rslora else 8)
    plain = DecodedView(base.checkpoint)
    run(plain, uniform_plan(plain, "F32", None), tmp_path / "f32.gguf")
    before = by_torch(base.model)
    mine = by_torch(with_adapter(base.model, str(out)))
    theirs = by_llama(AdaptedCheckpoint(open_checkpoint(tmp_path / "f32.gguf"), read_adapter(tmp_path / "adapter.gguf")))
    assert np.abs(mine - before).max() > 0.3 * mine.std()
    assert np.abs(mine - theirs).max() < 1e-3 * mine.std()
    other = open_base(tiny.DENSE)
    with pytest.raises(AdapterError, match="not on qk-dense-6m"):
        export_adapter(out, other, tmp_path / "other.gguf")
    (tmp_path / "adapter.gguf").write_bytes((tmp_path / "adapter.gguf").read_bytes()[:300])
    with pytest.raises(CheckpointError):
        read_adapter(tmp_path / "adapter.gguf")


def test_a_merge_keeps_types_and_changes_only_what_has_a_pair(trained, tmp_path):
    path, out = trained("qwen2_moe")
    base = open_base(path)
    merge(out, base, tmp_path / "merged.gguf")
    mine, theirs = open_checkpoint(tmp_path / "merged.gguf"), base.checkpoint
    pairs = read_lora_names(out, theirs)
    for name, info in theirs.tensors.items():
        assert mine.info(name).dtype == info.dtype
        same = np.array_equal(mine.read(name), theirs.read(name))
        assert same == (name not in pairs), name
    wanted = AdaptedCheckpoint(DecodedView(theirs), read_adapter(_exported(out, base, tmp_path)))
    for name in pairs:
        left, step = np.abs(mine.read(name) - wanted.read(name)), np.abs(wanted.read(name)).max() / 8
        assert left.max() <= step, name  # a step of Q4_0 at most
    before, adapted = by_torch(base.model), by_torch(with_adapter(base.model, str(out)))
    merged = by_torch(open_base(tmp_path / "merged.gguf").model)
    assert np.abs(merged - adapted).mean() < 0.7 * np.abs(before - adapted).mean()
    with pytest.raises(AdapterError, match="is no GGUF"):
        folder = tmp_path / "plain"
        tiny.build("llama", folder)
        train.sft(folder, ROWS, tmp_path / "run", SftOptions(steps=1, batch=8, together=8, lora=LoraOptions(rank=2)))
        merge(tmp_path / "run", open_base(folder), tmp_path / "no.gguf")


def _exported(out: Path, base, folder: Path) -> Path:
    export_adapter(out, base, folder / "a.gguf")
    return folder / "a.gguf"


def read_lora_names(out: Path, checkpoint) -> set[str]:
    from quantkit.rl.export import read_lora

    return set(read_lora(out, checkpoint).pairs)


# ── check-rewards ──


def test_rewards_that_work_give_no_warnings():
    findings = check_rewards(gsm8k_rewards(), GOOD, BAD)
    assert [finding.name for finding in findings] == [
        "exact_format",
        "approximate_format",
        "answer_score",
        "number_score",
        "all together",
    ]
    assert findings[-1].good == 13 and findings[-1].right == 1 and findings[-1].bad < 5
    assert not any(finding.warnings for finding in findings), [finding.warnings for finding in findings]
    assert findings[-1].degenerate["Hello Hello Hello and the answer"] < 0 and findings[0].milliseconds > 0


def reward(score):
    def call(prompts, completions, **columns):
        return [score(n, completion, columns) for n, completion in enumerate(completions)]

    return call


@pytest.mark.parametrize("score, words", [
    (lambda n, text, columns: 1.0, "is constant: 1 for everything"),
    (lambda n, text, columns: float(text.removesuffix("</SOLUTION>").endswith(columns["answer"][n])), "pays for nonsense that ends in the answer"),
    (lambda n, text, columns: float(columns["answer"][n] in text), "pays for Hello Hello Hello and the answer"),
    (lambda n, text, columns: float("<SOLUTION>" in text), "pays for always the same answer"),
    (lambda n, text, columns: -float("<SOLUTION>" in text), "disagrees with the labels"),
    (lambda n, text, columns: float(n), "depends on the neighbours"),
    (lambda n, text, columns: float(len(text) > 3 and np.random.rand()), "is not steady"),
    (lambda n, text, columns: 1 / 0, "fails: .*ZeroDivisionError"),
    (lambda n, text, columns: float("nan"), "fails: .*no finite number"),
    (lambda n, text, columns: None, "applies to none"),
])  # fmt: skip
def test_rewards_that_lie_are_told(score, words):
    made = reward(score)
    made.__name__ = "mine"
    (finding,) = check_rewards([made], GOOD, BAD)
    with_warnings = " | ".join(finding.warnings)
    import re

    assert re.search(words, with_warnings), with_warnings


def test_rewards_that_hang_are_stopped():
    def slow(prompts, completions, **columns):
        while True:
            pass

    (finding,) = check_rewards([slow], GOOD, BAD, patience=0.2)
    assert finding.warnings == ["hangs: no values after 0.2 s"]
    with pytest.raises(RewardError, match="no good samples"):
        check_rewards([slow], [], BAD)


# ── advice ──


def test_advice_fits_what_went_wrong():
    log = [
        {
            "groups/dead": 0.9,
            "groups/dead_nothing": 0.8,
            "completions/clipped_ratio": 0.9,
            "sampling/sampling_logp_difference/mean": 0.3,
        }
    ]
    hard = advice_for_grpo(log)
    assert len(hard) == 3 and "priming" in hard[0] and "--completion" in hard[1] and "0.30 nats" in hard[2]
    assert "too easy" in advice_for_grpo([{"groups/dead": 0.9, "groups/dead_nothing": 0.1}])[0]
    assert advice_for_grpo([{"groups/dead": 0.2, "groups/dead_nothing": 0.2}]) == []
    assert advice_for_sft([{"loss": 0.6}]) == [] and "template" in advice_for_sft([{"loss": 4.0}])[0]


# ── commands ──


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def call(*arguments, ok: bool = True) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0 if ok else result.exit_code != 0, result.output
    assert ok or result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def test_the_commands_prime_train_export_and_check(trained, tmp_path):
    base, _ = trained("llama")
    rows = lines(tmp_path / "rows.jsonl", [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS])
    common = ["--batch", 4, "--together", 8, "--rank", 2, "--learning-rate", 1e-2]
    said = call("rl", "sft", base, "--data", rows, "--field", "prompt=question", "--field", "completion=answer", "-o", tmp_path / "sft",
                "--steps", 2, *common)  # fmt: skip
    assert "2 steps" in said and "bytes are unchanged" in said
    (tmp_path / "mine.py").write_text(
        "def digits(prompts, completions, **c):\n    return [float(len(x[0]['content'])) for x in completions]\n"
    )
    found = json.loads(call(
        "rl", "grpo", base, "--data", rows, "--field", "prompt=question", "--rewards", tmp_path / "mine.py", "--adapter", tmp_path / "sft",
        "-o", tmp_path / "grpo", "--steps", 1, "--generations", 4, "--completion", 4, "--json", *common,
    ))  # fmt: skip
    assert found["steps"] == 1 and found["log"][0]["rewards/digits/mean"] > 0
    call("rl", "report", tmp_path / "grpo")
    page = (tmp_path / "grpo" / "report.html").read_text()
    assert "digits" in page and page.count("<svg") > 5 and "src=" not in page and "@import" not in page
    assert page.count("<tr><td><pre>") == 2 * 4 and "advantage" in page and "<script" not in page
    assert "--force to replace it" in call("rl", "report", tmp_path / "grpo", ok=False)
    assert "has no run.json" in call("rl", "report", tmp_path, ok=False)
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    assert "1 steps" in call("rl", "dpo", base, "--data", pairs, "-o", tmp_path / "dpo", "--steps", 1, *common)
    labels = lines(tmp_path / "labels.jsonl", [{"prompt": "a", "completion": "b", "label": True}] * 8)
    assert "all labels are True" in call("rl", "dpo", base, "--data", labels, "-o", tmp_path / "kto", "--loss", "kto", ok=False)
    assert "pairs of rank 2" in call("rl", "export", tmp_path / "grpo", "--base", base, "-o", tmp_path / "adapter.gguf")
    said = call("rl", "export", tmp_path / "grpo", "--base", base, "-o", tmp_path / "merged.gguf", "--merge")
    assert "tensors changed" in said and "nats/token against base plus adapter" in said
    assert "--force to replace it" in call(
        "rl", "export", tmp_path / "grpo", "--base", base, "-o", tmp_path / "adapter.gguf", ok=False
    )
    good, bad = lines(tmp_path / "good.jsonl", GOOD), lines(tmp_path / "bad.jsonl", BAD)
    assert "pairs ranked right" in call("rl", "check-rewards", "library:gsm8k", "--samples", good, bad)
    assert "pays for always the same answer" in call(
        "rl", "check-rewards", "library:no_repetition", "--samples", good, bad, ok=False
    )


@pytest.mark.parametrize("text, words", [
    ("", "has no rows"), ("{", "line 1: no JSON"), ("[1]", "line 1: a list, not an object"), ('{"prompt": "a"}', "no field 'completion'"),
    ('{"prompt": "a", "completion": ""}', "an empty field 'completion'"), ('{"messages": [{"role": "user", "content": "a"}]}', "does not mark what the model says"),
])  # fmt: skip
def test_bad_rows_are_refused(trained, tmp_path, text, words):
    base, _ = trained("llama")
    (tmp_path / "rows.jsonl").write_text(text)
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    said = call("rl", "sft", base, "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "--template", template, ok=False)
    assert words in said and "Traceback" not in said
    with pytest.raises(RewardError, match="no field 'question'"):
        read_rows(Path(lines(tmp_path / "b.jsonl", [{"a": 1}])), {"prompt": "question"})
    assert "is not NEW=OLD" in call(
        "rl", "sft", base, "--data", tmp_path / "b.jsonl", "-o", tmp_path / "x", "--field", "a", ok=False
    )


def test_pass_at_k_before_and_after(trained, tmp_path):
    """The same prompts and random numbers: an adapter that changes nothing changes no rate; completions of one that does differ."""
    from quantkit.rl.measure import measure

    base, out = trained("llama")
    rows = [{"prompt": f"Say {n}."} for n in range(4)]

    def vowels(prompts, completions, **columns):
        return [float("a" in completion[0]["content"]) for completion in completions]

    before, after = measure(base, rows, [vowels], 6, (1, 3, 6), adapter=out, completion=5)
    assert 0 < before.pass_at[1] < before.pass_at[3] < before.pass_at[6] <= 1 and before.pass_at[1] == pytest.approx(
        before.reward
    )
    assert before.majority_at[1] == pytest.approx(before.pass_at[1]) and before.pass_errors[1] > 0
    assert (after.reward, after.name) != (before.reward, before.name) and after.name.endswith("llama-False")
    (alone,) = measure(base, rows, [vowels], 6, (1, 3, 6), completion=5)
    assert alone == before
    with pytest.raises(AdapterError, match="k of"):
        measure(base, rows, [vowels], 2, (4,))
    (tmp_path / "r.py").write_text(
        "def vowels(prompts, completions, **c):\n    return [float('a' in x[0]['content']) for x in completions]\n"
    )
    said = call(
        "rl",
        "measure",
        base,
        "--data",
        lines(tmp_path / "p.jsonl", rows),
        "--rewards",
        tmp_path / "r.py",
        "-n",
        2,
        "-k",
        1,
        "--completion",
        3,
    )
    assert "pass@1" in said and "4 prompts, 2 completions each" in said
