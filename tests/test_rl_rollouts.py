"""Ways of drawing completions: leave-one-out, tools, a cache of one size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trl
from click.testing import CliRunner

from quantkit.cli import main
from quantkit.errors import AdapterError, RewardError
from quantkit.rl import drawing, rollouts, train
from quantkit.rl.base import open_base
from quantkit.rl.options import GrpoOptions, LoraOptions, SftOptions
from quantkit.rl.rewards import text_of
from quantkit.rl.rollouts import Completions, Sampling, TorchEngine
from quantkit.rl.sample import best
from quantkit.rl.tools import python, tools_of

ROWS = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(8)]
OPTIONS = GrpoOptions(
    steps=2, generations=4, together=8, batch=4, completion=6, learning_rate=1e-2, lora=LoraOptions(rank=4), seed=3
)  # fmt: skip
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
TOOLS = '''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b
'''


def letters(prompts, completions, **columns):
    """Rewards the letter a."""
    return [float(text_of(completion).count("a")) for completion in completions]


def test_leave_one_out_learns_with_the_mean_of_the_others(tiny_gguf, tmp_path):
    """Samples have reward − mean of the other rewards of their group as advantage; a run goes on to the same bits."""
    outcome = train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "run", GrpoOptions(**{**vars(OPTIONS), "loss": "rloo"}))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["run"]["method"] == "rloo"
    assert outcome.steps == 2 and all("entropy" in row for row in outcome.log if "loss" in row)
    groups: dict[tuple, list] = {}
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups.setdefault((row["step"], row["group"]), []).append((row["rewards"]["letters"], row["advantage"]))
    found = [(v, a, (sum(w for w, _ in group) - v) / 3) for group in groups.values() for v, a in group]
    assert len(found) == 16 and any(v != others for v, _, others in found)
    assert all(a == pytest.approx(v - others, abs=1e-5) for v, a, others in found)


def test_leave_one_out_refuses_what_it_cannot_correct(tiny_gguf, tmp_path):
    for more in ({"engine": "llama"}, {}):
        tools = () if more else (python,)
        with pytest.raises(AdapterError, match="corrects for no engine"):
            options = GrpoOptions(**{**vars(OPTIONS), "loss": "rloo", **more})
            train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "run", options, tools=tools)


class Caller:
    """An engine that calls a tool first and then says what it got."""

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def complete(self, model, prompts, sampling):
        said = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts += said
        answers = [
            "It is 5." if "tool_response" in text else
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>' for text in said
        ]  # fmt: skip
        ids = [[*self.tokenizer.encode(text, add_special_tokens=False), sampling.ends[0]] for text in answers]
        return Completions(ids, [[-1.0] * len(row) for row in ids])

    def close(self):
        pass


def test_completions_call_tools(tiny_gguf, tmp_path, monkeypatch):
    """The tool's answer stands in the next prompt, the reward sees all turns, and what the tool said is not learned."""
    base = open_base(tiny_gguf("qwen3"))
    engine = Caller(base.tokenizer)
    monkeypatch.setattr(rollouts, "engine_of", lambda *_: engine)
    (tmp_path / "tools.py").write_text(TOOLS)
    seen = []

    def right(prompts, completions, **columns):
        seen.extend(completions)
        return [float("5" in text_of(completion)) for completion in completions]

    options = GrpoOptions(**{**vars(OPTIONS), "steps": 1, "completion": 200, "max_length": 1200})
    outcome = train.grpo(
        tiny_gguf("qwen3"),
        ROWS,
        [right],
        tmp_path / "run",
        options,
        template=TEMPLATE,
        tools=tools_of(str(tmp_path / "tools.py")),
    )
    assert any("tool_response" in text and "5" in text for text in engine.prompts)
    assert [message["role"] for message in seen[0]] == ["assistant", "tool", "assistant"] and seen[0][1]["content"] == "5"
    assert outcome.log[0]["tools/call_frequency"] == 1.0 and outcome.log[0]["tools/failure_frequency"] == 0.0
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])["completion"]
    assert "add" in sample and "tool: 5" in sample and "It is 5." in sample


def test_tools_that_cannot_be_used_are_refused_by_name(tiny_gguf, tmp_path):
    path = tmp_path / "tools.py"
    path.write_text("def add(a, b):\n    return a + b\n")
    with pytest.raises(RewardError, match="the tool add cannot be described"):
        tools_of(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(RewardError, match="has no tools"):
        tools_of(str(path))
    path.write_text("TOOLS = [3]\n")
    with pytest.raises(RewardError, match="3 is no function"):
        tools_of(str(path))
    with pytest.raises(RewardError, match="no tool 'shell'"):
        tools_of("library:shell")
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(RewardError, match="knows no tools"):
        train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "run", OPTIONS, template=plain, tools=[python])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    said = CliRunner().invoke(main, ["rl", "grpo", str(tiny_gguf("llama")), "--data", str(tmp_path / "rows.jsonl"), "--rewards",
                                     "library:no_repetition", "--tools", "library:shell", "-o", str(tmp_path / "run")])  # fmt: skip
    assert said.exit_code == 1 and "no tool 'shell'" in said.output and not (tmp_path / "run").exists()


def test_programs_run_in_the_sandbox():
    assert python("print(6 * 7)") == "42\n"
    assert "forbidden" in python("import socket\nsocket.socket()") or "import" in python("import socket")
    assert "ZeroDivisionError" in python("1 / 0")


def test_a_cache_of_one_size_draws_the_same(tiny_gguf):
    base = open_base(tiny_gguf("llama"))
    prompts = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    sampling = Sampling(8, 1.0, [1], 0, seed=5)
    dynamic, static = (TorchEngine(cache=cache).complete(base.model, prompts, sampling) for cache in (None, "static"))
    assert dynamic.ids == static.ids
    for a, b in zip(dynamic.log_probabilities, static.log_probabilities, strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)


def test_accepted_completions_become_rows(tiny_gguf, tmp_path, monkeypatch):
    """The best distinct ones of each prompt, with their rewards; training goes on with them; nothing accepted is an error."""
    rows, base = tmp_path / "rows.jsonl", tiny_gguf("llama")
    monkeypatch.setattr(drawing, "ends_of", lambda *_: list(range(100, 4096, 8)))  # a random model hardly ever ends
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rewards.py").write_text(
        "from quantkit.rl.rewards import text_of\n"
        "def letters(prompts, completions, **columns):\n    return [float(text_of(c).count('a')) for c in completions]\nWEIGHTS = [2.0]\n"
    )
    common = ["rl", "sample", str(base), "--data", str(rows), "--rewards", str(tmp_path / "rewards.py"), "--completion", "12"]
    said = CliRunner().invoke(main, [*common, "-n", "8", "--keep", "2", "-o", str(tmp_path / "traces.jsonl"), "--json"])
    assert said.exit_code == 0, said.output
    told, found = json.loads(said.output), [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert told["drawn"] == 64 and told["rows"] == len(found) and told["prompts"] == len({row["prompt"] for row in found})
    assert all(row["reward"] == 2 * row["completion"].count("a") > 0 and row["answer"] in row["prompt"] for row in found)
    assert 0 < told["accepted"] <= told["ended"] < told["drawn"]
    assert len({(row["prompt"], row["completion"]) for row in found}) == len(found)
    again = CliRunner().invoke(main, [*common, "-o", str(tmp_path / "traces.jsonl")])
    assert again.exit_code == 1 and "exists" in again.output
    nothing = CliRunner().invoke(main, [*common, "--right-above", "99", "-o", str(tmp_path / "none.jsonl")])
    assert nothing.exit_code == 1 and "completions ended and got more than 99" in nothing.output
    assert not (tmp_path / "none.jsonl").exists()
    second = train.sft(base, found, tmp_path / "second", SftOptions(steps=1, batch=2, together=4, lora=LoraOptions(rank=4)))
    assert second.steps == 1


def test_the_best_completions_come_first_and_the_shorter_of_equals():
    row = {"prompt": "p", "answer": 3}
    found = best(row, ["long one", "one", "two", "none", "two"], [1.0, 1.0, 2.0, 0.0, 2.0], 0.0, 2)
    assert found == [{**row, "completion": "two", "reward": 2.0}, {**row, "completion": "one", "reward": 1.0}]
