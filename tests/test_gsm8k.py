"""Word problems end to end on the shipped model: that all parts fit together, not that it can reckon."""

from __future__ import annotations

import json

import oracle
import pytest
import tiny
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run
from quantkit.rl.rewards import gsm8k_rewards

TEMPLATE = (
    "{%- for m in messages -%}{{ m['content'] }}{{ '\\n' if m['role'] == 'user' else eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<start_working_out>{%- endif -%}"
)
DATA = oracle.SHARED / "data" / "gsm8k"


def test_a_perfect_completion_of_a_row_of_gsm8k_gets_thirteen():
    solution = "Half of 48 is <<48/2=24>>24, together 72.\n#### 72"
    said = "Half of 48 is 24.</start_working_out><SOLUTION>72</SOLUTION>"
    assert sum(reward(prompts=[""], completions=[said], answer=[solution])[0] for reward in gsm8k_rewards()) == 13
    said = said.replace(">72<", ">1,072<")
    assert (
        sum(reward(prompts=[""], completions=[said], answer=["#### 1072"])[0] for reward in gsm8k_rewards()) == 3 + 1.5 + 2 + 3.5
    )


@pytest.mark.skipif(not DATA.exists() and not oracle.REQUIRED, reason="needs ../shared/data")
def test_prompts_and_rewards_run_end_to_end(tmp_path):
    """Priming on rows of the training set, a step of GRPO with the library's rewards, and measuring on the test set."""
    checkpoint = open_checkpoint(tiny.DENSE)
    run(checkpoint, uniform_plan(checkpoint, "Q4_0", None), tmp_path / "base.gguf")
    (tmp_path / "tags.jinja").write_text(TEMPLATE)
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    short = sorted(rows, key=lambda row: len(row["question"] + row["answer"]))
    primer = []
    for row in short[:8]:
        steps, _, answer = row["answer"].partition("\n#### ")
        primer.append({**row, "completion": f"{steps}</start_working_out><SOLUTION>{answer}</SOLUTION>"})
    for name, part in (("primer", primer), ("train", short[8:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    test = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    test = sorted(test, key=lambda row: len(row["question"]))[:4]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    common = ["--field", "prompt=question", "--template", str(tmp_path / "tags.jinja")]

    def quantkit(command, *arguments):
        said = CliRunner().invoke(main, ["rl", command, str(tmp_path / "base.gguf"), *common, *arguments, "--json"])
        assert said.exit_code == 0, said.output
        return json.loads(said.output)

    quantkit("sft", "--data", str(tmp_path / "primer.jsonl"), "--max-length", "512", "--learning-rate", "1e-3", "--epochs", "3",
             "-o", str(tmp_path / "primed"))  # fmt: skip
    found = quantkit(
        "grpo", "--data", str(tmp_path / "train.jsonl"), "--rewards", "library:gsm8k", "--adapter", str(tmp_path / "primed"),
        "--steps", "1", "--generations", "4", "--together", "16", "--completion", "64", "--max-length", "512", "-o", str(tmp_path / "run"),
    )  # fmt: skip
    names = ("exact_format", "approximate_format", "answer_score", "number_score")
    assert all(f"rewards/{name}/mean" in found["log"][0] for name in names)
    assert found["log"][0]["reward"] == pytest.approx(sum(found["log"][0][f"rewards/{name}/mean"] for name in names), abs=1e-4)
    rates = quantkit(
        "measure", "--data", str(tmp_path / "test.jsonl"), "--rewards", "library:gsm8k", "--adapter", str(tmp_path / "run"),
        "-n", "2", "-k", "1", "-k", "2", "--completion", "64", "--right-above", "10",
    )  # fmt: skip
    assert len(rates) == 2 and all(-7.5 <= row["reward"] <= 13 for row in rates)
