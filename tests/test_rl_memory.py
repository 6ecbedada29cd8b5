"""Memory of a step of training: the formula against what is really alive."""

from __future__ import annotations

import json

import pytest
import tiny
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.planning.memory import Shape
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run
from quantkit.rl.memory import Step, StepMemory, adapter_size, measured_step, step_memory, weights_in_memory

SIZES = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
}
STEPS = [
    Step(2, 248, 8, 4, rank=4, itemsize=4), Step(2, 248, 8, 4, rank=4, itemsize=4, saving=True),
    Step(2, 248, 8, 4, rank=4, itemsize=2), Step(2, 248, 8, 4, rank=4, itemsize=2, saving=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's file in Q4_0, by architecture, wide enough for its layers to count."""
    folder = tmp_path_factory.mktemp("memory")

    def get(name):
        path = folder / f"{name}.gguf"
        if not path.exists():
            checkpoint = open_checkpoint(tiny.build(name, folder / name, **SIZES[name]))
            run(checkpoint, uniform_plan(checkpoint, "Q4_0", None), path)
        return path

    return get


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{8 * s.itemsize} bits{', saving' * s.saving}")
@pytest.mark.parametrize("name", SIZES)
def test_the_formula_is_what_is_alive(base, name, step):
    checkpoint = open_checkpoint(base(name))
    told = step_memory(Shape.of(checkpoint), weights_in_memory(checkpoint, step.itemsize), step)
    found = measured_step(base(name), step)
    assert found.adapter == told.adapter
    assert told.weights == pytest.approx(found.weights, rel=0.05)
    assert told.training == pytest.approx(found.training, rel=0.2)
    assert told.drawing == pytest.approx(found.drawing, rel=0.2)


def test_saving_memory_saves_it(base):
    plain, saving = (measured_step(base("llama"), step) for step in STEPS[:2])
    assert saving.training < 0.7 * plain.training


def test_completions_are_drawn_without_a_second_copy_of_the_base(base):
    """What drawing a token adds is a fraction of the weights; with a copy it would be all of them."""
    found = measured_step(base("qwen3"), Step(1, 4, 1, 1, rank=4))
    assert found.drawing < 0.3 * found.weights < found.second_copy
    assert StepMemory(100, 16, 7, 9).peak == 125 and StepMemory(100, 16, 7, 9).second_copy == 104


def test_eight_billion_parameters_fit_into_twelve_gigabytes():
    """Llama 3 8B at 4.9 bits per weight, 8 completions of 2,048 tokens drawn together and trained one after the other, on paper."""
    shape = Shape("llama", 32, 4096, 32, 8, 128, 128256, 14336)
    step = Step(sequences=1, prompt=256, completion=1792, drawn=8, itemsize=2, saving=True, offloaded=True, panels=True)
    told = step_memory(shape, int(8.03e9 * 4.9 / 8), step)
    assert adapter_size(shape, 16, False) == 41_943_040  # PEFT's own count for rank 16 on all seven maps
    assert 7e9 < told.peak < 12e9
    assert step_memory(shape, told.weights, Step(**{**vars(step), "sequences": 8})).peak < 12e9


def test_the_command_prints_a_table_and_refuses_what_is_no_model(base, tmp_path):
    said = CliRunner().invoke(
        main,
        [
            "rl",
            "memory",
            str(base("llama")),
            "--prompt",
            "60",
            "--completion",
            "4",
            "--batch",
            "2",
            "--together",
            "4",
            "--measure",
            "--json",
        ],
    )
    assert said.exit_code == 0, said.output
    rows = json.loads(said.output)
    assert rows["measured"]["training"] > 0 and rows["formula"]["peak"] > rows["formula"]["weights"]
    said = CliRunner().invoke(main, ["rl", "memory", str(base("llama"))])
    assert said.exit_code == 0 and "iB)" in said.output and "peak" in said.output
    assert CliRunner().invoke(main, ["rl", "memory", str(tmp_path)]).exit_code == 1
