"""Text from packed models: the tokens of llama.cpp, choosing by chance, the command."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit.api import generate, quantize
from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluation.generate import Sampling, choose
from quantkit.evaluation.runners import LlamaRunner
from quantkit.modeling.packed import packed_model
from quantkit.modeling.text import TextEncoder

PROMPTS = [
    "Once upon a time there was a little girl", "The dog and the cat", "Tom wanted to", "In the morning the sun",
    "Lily found a big red ball",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return quantize(tiny.MOE, tmp_path_factory.mktemp("generate") / "moe-Q4_K_M.gguf", "Q4_K_M", use_importance=False)[0]


def test_greedy_tokens_are_those_of_llama_cpp(file):
    """64 tokens of five prompts; where they part, the two best logits are closer than the runtimes are to each other."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        oracle.missing("llama-cpp-python")
    checkpoint = open_checkpoint(file)
    model, runner, same = packed_model(checkpoint), LlamaRunner(checkpoint, 128), 0
    for prompt in PROMPTS:
        ours, theirs = (generate(file, prompt, 64, runtime=name) for name in ("torch", "llama"))
        assert ours.prompt == theirs.prompt and len(ours.tokens) == 64 and ours.text
        parted = next((i for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)) if a != b), None)
        same += parted is None
        if parted is not None:
            ids = np.array(ours.prompt + ours.tokens[:parted])
            with torch.inference_mode():
                mine = model(torch.from_numpy(ids)[None]).logits[0, -1]
            difference = (mine - runner.logits(ids)[-1]).abs().max()
            best = mine.topk(2).values
            assert best[0] - best[1] <= 2 * difference, (prompt, parted)
    runner.close()
    assert same >= 1


def test_chance_follows_temperature_and_limits():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])
    chance = torch.Generator().manual_seed(0)
    assert choose(logits, Sampling(), chance) == 0
    drawn = [choose(logits, Sampling(temperature=1.0), chance) for _ in range(2000)]
    shares = np.bincount(drawn, minlength=4) / 2000
    assert np.abs(shares - logits.softmax(0).numpy()).max() < 0.04
    assert {choose(logits, Sampling(temperature=1.0, top_k=2), chance) for _ in range(200)} == {0, 1}
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.5), chance) for _ in range(200)} == {0}
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.7), chance) for _ in range(200)} == {0, 1}
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -2}):
        with pytest.raises(QuantkitError, match="cannot sample"):
            Sampling(**bad)


def test_the_command_prints_the_text_as_it_comes(file):
    def call(*arguments):
        return CliRunner().invoke(main, ["generate", str(file), *arguments])

    plain = call("-p", PROMPTS[0], "-n", "12")
    assert plain.exit_code == 0 and plain.stdout.startswith(PROMPTS[0]) and "12 tokens, " in plain.stderr
    facts = json.loads(call("-p", PROMPTS[0], "-n", "12", "--json").stdout)
    assert PROMPTS[0] + facts["text"] == plain.stdout.rstrip("\n") and len(facts["tokens"]) == 12
    drawn = [json.loads(call("-p", "Tom", "-n", "12", "--json", "--temperature", "2", "--seed", seed).stdout) for seed in "112"]
    assert drawn[0]["tokens"] == drawn[1]["tokens"] != drawn[2]["tokens"]
    chat = json.loads(call("-p", "Tom", "-n", "2", "--json", "--chat").stdout)
    assert len(chat["prompt_tokens"]) > len(drawn[0]["prompt_tokens"])
    refused = call("-p", "Tom", "--temperature", "-1")
    assert refused.exit_code != 0 and "cannot sample" in refused.stderr and not refused.stdout
    assert call("-p", "Tom", "--device", "cuda:9").exit_code != 0
    assert generate(file, "", 3).tokens  # after the beginning-of-text token alone


def test_nothing_at_all_is_no_prompt(file, monkeypatch):
    monkeypatch.setattr(TextEncoder, "prompt", lambda self, text: [])
    with pytest.raises(CalibrationError, match="prompt is empty"):
        generate(file, "")


def test_spaces_and_contexts_are_kept(tiny_folder):
    """A SentencePiece model's first new word keeps its space; no more tokens than the context holds."""
    folder = tiny_folder("llama")
    out = generate(folder, "Once upon", 8)
    encoder = TextEncoder(open_checkpoint(folder))
    assert encoder.decode(out.prompt) + out.text == encoder.decode(out.prompt + out.tokens)
    assert len(generate(folder, "a " * 480, 128).prompt) + len(generate(folder, "a " * 480, 128).tokens) <= 512
    with pytest.raises(CalibrationError, match="the model's context 512"):
        generate(folder, "a " * 600, 1)


def test_generating_ends_with_the_text(file, monkeypatch):
    first = generate(file, PROMPTS[0], 4).tokens[2]
    before = TextEncoder.__init__

    def ending(self, checkpoint):
        before(self, checkpoint)
        self.ends = [first]

    monkeypatch.setattr(TextEncoder, "__init__", ending)
    assert len(generate(file, PROMPTS[0], 64).tokens) == 2
