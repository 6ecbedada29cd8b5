"""A run while it goes on: in the terminal, and killed in the middle."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from quantkit.rl.live import BARS, Live, curve, table

LOG = [
    {"step": n + 1, "loss": 2.0 - n / 10, "reward": float(n), "rewards/right/mean": n / 2, "rewards/form/mean": 1.0, "kl": 0.01}
    for n in range(5)
]  # fmt: skip
SAMPLE = {"completion": "It is [5].", "rewards": {"right": 1.0, "form": None}}


def shown(renderable) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_curves_go_from_the_least_to_the_largest():
    assert curve([0.0, 1.0, 2.0]) == BARS[0] + BARS[4] + BARS[7]
    assert curve([3.0, 3.0]) == BARS[0] * 2 and curve([5.0]) == BARS[0]
    assert curve([1.0, float("nan"), 2.0, float("inf")]) == curve([1.0, 2.0]) and curve([float("nan")]) == ""
    long = curve([float(n) for n in range(1000)])
    assert len(long) == 32 and long[0] == BARS[0] and long[-1] == BARS[-1] and list(long) == sorted(long)


def test_the_table_has_every_number_with_its_name_and_the_time_left():
    text = shown(table(LOG, 20, 60.0, SAMPLE))
    assert "step 5 of 20, 1.0 min, 3.0 min left" in text and "It is [5]." in text and "right 1" in text and "form" in text
    row = next(line for line in text.splitlines() if "reward, all together" in line)
    assert " 4 " in row and row.rstrip().endswith(BARS[-1])
    assert "step 0 of 20" in shown(table([], 20, 0.0))
    assert "5.0 min left" in shown(table(LOG, 20, 20.0, begun=4)) and "left" not in shown(table(LOG, 20, 20.0, begun=5))
    hostile = {"completion": "\x1b]0;owned\x07 \x1b[2Jfine\u009b1m", "rewards": {"right": float("nan")}}
    text = shown(table([{"step": 1, "rewards/right/mean": float("nan")}], 20, 1.0, hostile))
    assert "\x1b" not in text and "\u009b" not in text and "fine" in text


def test_nothing_is_drawn_where_there_is_no_terminal():
    quiet, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True, width=80)
    for console in (quiet, terminal):
        live = Live(20, console)
        live.show(LOG, SAMPLE)
        live.close()
        live.close()
    assert quiet.file.getvalue() == "" and "step 5 of 20" in terminal.file.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tiny_gguf, tmp_path):
    """SIGKILL at any step; --resume ends with the adapter, log and samples of a run that nobody disturbed."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(8)))
    rewards = "def reward(prompts, completions, **columns):\n    return [float(len(str(c)) % 7) for c in completions]\n"
    (tmp_path / "rewards.py").write_text(rewards)
    command = [
        sys.executable, "-c", "from quantkit.cli import main; main()", "rl", "grpo", str(tiny_gguf("llama")), "--data", str(tmp_path / "rows.jsonl"), "--rewards",
        str(tmp_path / "rewards.py"), "--steps", "6", "--generations", "4", "--together", "8", "--completion", "6", "--save-every", "2",
        "--learning-rate", "0.01", "--rank", "4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True, env=environment)
    running = subprocess.Popen(
        [*command, "-o", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    end = time.monotonic() + 120
    while not (killed / "checkpoints" / "checkpoint-2").exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert running.poll() is None, "the run ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (killed / "adapter_model.safetensors").exists()
    again = subprocess.run([*command, "-o", str(killed), "--resume"], capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    name = "adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    timed = ("train_runtime", "step_time", "train_samples_per_second", "train_steps_per_second")
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in timed}
            for line in (folder / "log.jsonl").read_text().splitlines()
        ]
        for folder in (whole, killed)
    ]
    assert logs[0][:6] == logs[1][:6]
