"""Completions from a server with vLLM's protocol: the newest adapter, exact log-probabilities, and every failure.

The server is a stand-in (vllm_stub.py).
"""

from __future__ import annotations

import copy
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vllm_stub import WINDOW, Handler, Stub, error

from quantkit.errors import AdapterError, OutputError
from quantkit.rl import rollouts, rollouts_vllm, train
from quantkit.rl.base import open_base
from quantkit.rl.options import GrpoOptions, LoraOptions
from quantkit.rl.plugin_peft import DEFAULT_TARGETS, EXPERTS, lora_config, with_new_adapter
from quantkit.rl.rollouts import Sampling
from quantkit.rl.rollouts_vllm import VllmEngine, write_for_vllm

KNOBS = ("mode", "updates", "most", "ranks", "cap")  # of the stand-in; other options are the engine's
PROMPTS = [[5, 6, 7], [9], [5, 6, 7, 8, 9, 10], [300, 301], [9], [44, 45, 46, 47]]


@pytest.fixture(scope="module")
def served(tiny_folder):
    """The model that the stand-in runs."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(tiny_folder):
    """The base, and its model with an adapter that changes much."""
    base = open_base(tiny_folder("llama"))
    model = with_new_adapter(base.model, lora_config(base.model, 4)).eval()
    shake(model, 1)
    return base, model


@pytest.fixture
def start(served, pair, monkeypatch):
    """Starts stand-ins and engines on them; all are closed in the end. Pauses are none."""
    monkeypatch.setattr(rollouts_vllm, "PAUSES", (0.0, 0.0))
    made = []

    def get(engine=True, fault=None, **options):
        stub = Stub(served, **{name: options.pop(name) for name in KNOBS if name in options})
        made.append(stub.stop)
        stub.fault = fault or stub.fault
        if not engine:
            return stub
        made.insert(0, (found := VllmEngine(pair[0], options.pop("url", stub.url), WINDOW, **options)).close)
        return stub, found

    yield get
    for close in made:
        close()


def shake(model, seed: int) -> None:
    """Another adapter: second halves drawn anew."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=draw)


def sampling(**changes) -> Sampling:
    return Sampling(**{"count": 6, "temperature": 1.0, "ends": [1], "pad": 2, "seed": 3, "step": 0, **changes})


def scores(model, prompt, ids, temperature=1.0) -> np.ndarray:
    """The trainer's log-probabilities."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


def gap(model, found, temperature=1.0) -> float:
    """Largest difference of reported and own log-probabilities."""
    rows = zip(PROMPTS, found.ids, found.log_probabilities, strict=True)
    return max(np.abs(scores(model, prompt, ids, temperature) - values).max() for prompt, ids, values in rows)


# ── what it draws ──


def test_each_step_is_drawn_with_its_own_adapter(start, pair):
    """Exact log-probabilities each time; names and folders are new, the old ones gone, and all is gone in the end."""
    model, (stub, engine) = pair[1], start()
    seen = []
    for step in range(3):
        shake(model, step)
        found = engine.complete(model, PROMPTS, sampling(step=step))
        assert gap(model, found) < 1e-4 and len(stub.adapters) == 1
        with model.disable_adapter():
            assert gap(model, found) > 0.1
        seen.append(found.ids)
    assert engine.complete(model, PROMPTS, sampling(step=2)).ids == seen[-1] and len(stub.names) == 3
    assert len({name for name, _ in stub.names}) == len({path for _, path in stub.names}) == 3
    assert [Path(path).exists() for _, path in stub.names] == [False, False, True]
    engine.close()
    assert not stub.adapters and not Path(stub.names[-1][1]).parent.exists()


def test_seeds_fix_each_completion_by_its_place(start, pair):
    model, (stub, engine) = pair[1], start()
    first = engine.complete(model, PROMPTS, sampling())
    assert engine.complete(model, PROMPTS, sampling()).ids == first.ids
    assert first.ids[1] != first.ids[4]  # the same prompt at two places
    assert engine.complete(model, PROMPTS[:2], sampling()).ids == first.ids[:2]
    assert engine.complete(model, PROMPTS, sampling(turn=1)).ids != first.ids
    _, other = start()
    assert other.complete(model, PROMPTS, sampling()).ids == first.ids
    drawn = [body for path, body in stub.asked if path == "/v1/completions" and body["model"] != "tiny"]
    assert {body["seed"] for body in drawn[:6]} == {sampling().stream(place) for place in range(6)}


@pytest.mark.parametrize("mode, options", [
    ("processed_logprobs", {"temperature": 0.7}), ("raw_logprobs", {}), ("raw_logprobs", {"top_k": 3}),
    ("raw_logprobs", {"top_p": 0.6}), ("raw_logprobs", {"min_p": 0.2}),
])  # fmt: skip
def test_log_probabilities_are_those_before_anything_is_cut_off(start, pair, mode, options):
    found = start(mode=mode)[1].complete(pair[1], PROMPTS, sampling(**options))
    assert gap(pair[1], found, options.get("temperature", 1.0)) < 1e-4


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6, "temperature": 1.5}, {"min_p": 0.2, "temperature": 1.5}])
def test_processed_ones_of_a_cut_lack_the_mass_that_was_cut_off(start, pair, options):
    """As the docstring says: larger by −log of the mass that is left. And only what our own cut leaves is drawn."""
    found = start()[1].complete(pair[1], PROMPTS, sampling(**options))
    for prompt, ids, values in zip(PROMPTS, found.ids, found.log_probabilities, strict=True):
        with torch.no_grad():
            logits = pair[1](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        left = rollouts.cut(torch.log_softmax(logits / options.get("temperature", 1.0), -1), sampling(**options))
        mass = left.exp().sum(-1).log().numpy()
        own = scores(pair[1], prompt, ids, options.get("temperature", 1.0))
        assert np.abs(np.array(values) - (own - mass)).max() < 1e-4 and mass.min() < -0.05


def test_the_token_that_ends_a_completion_belongs_to_it(start, pair):
    """Also where it is not the model's own; the model's own end is an ordinary token unless it is among the ends."""
    model, (_, engine) = pair[1], start()
    plain = engine.complete(model, PROMPTS, sampling(ends=[]))
    assert {len(ids) for ids in plain.ids} == {6}
    ends = [1, plain.ids[0][2], plain.ids[3][0]]
    found = engine.complete(model, PROMPTS, sampling(ends=ends))
    for ids, values, whole in zip(found.ids, found.log_probabilities, plain.ids, strict=True):
        size = next((n + 1 for n, token in enumerate(whole) if token in ends), 6)
        assert ids == whole[:size] and len(values) == size
    assert len(found.ids[0]) <= 3 and len(found.ids[3]) == 1


def test_requests_run_at_once_but_no_more_than_allowed_and_keep_their_order(start, pair):
    stub, engine = start(parallel=2)
    alone = [engine.complete(pair[1], PROMPTS[:place], sampling()).ids[-1] for place in range(1, 7)]
    stub.barrier, stub.busiest = threading.Barrier(2), 0
    found = engine.complete(pair[1], PROMPTS, sampling())
    assert found.ids == alone and stub.busiest == 2 and gap(pair[1], found) < 1e-4


def test_nothing_is_left_to_the_servers_defaults(start, pair):
    stub, engine = start()
    engine.complete(pair[1], PROMPTS[:1], sampling(top_p=0.9))
    body = stub.asked[-1][1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"]) == (1.0, 0.9, -1, 0.0, 6)
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert body["ignore_eos"] and body["stop_token_ids"] == [1] and body["prompt"] == PROMPTS[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_two_steps_of_grpo_have_no_mismatch(start, tiny_folder, tmp_path, rslora):
    stub = start(engine=False, most=512)
    options = GrpoOptions(
        steps=2, generations=4, together=8, batch=4, completion=6, max_length=256, learning_rate=5e-2, warmup=0,
        temperature=0.8, lora=LoraOptions(rank=4, rslora=rslora), engine="vllm", server=stub.url,
    )  # fmt: skip

    def letters(prompts, completions, **columns):
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    outcome = train.grpo(tiny_folder("llama"), [{"prompt": f"Say {n}."} for n in range(4)], [letters], tmp_path / "run", options)
    log = [row for row in outcome.log if "sampling/sampling_logp_difference/mean" in row]
    assert outcome.steps == len(log) == len(stub.names) == 2 and not stub.adapters
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in log)
    learned = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for key, value in learned.items() if "lora_B" in key) > 1e-3


def test_experts_are_written_under_the_names_of_the_checkpoint(tiny_folder, tiny_gguf, tmp_path):
    """A map of its own for each expert, as vLLM reads them, with the shapes of the model that was quantized."""
    base = open_base(tiny_gguf("qwen3_moe"))
    model = with_new_adapter(base.model, lora_config(base.model, 4, targets=(*DEFAULT_TARGETS, EXPERTS)))
    shake(model, 2)
    write_for_vllm(model, tmp_path / "adapter")
    with safe_open(tiny_folder("qwen3_moe") / "model.safetensors", "pt") as file:
        shapes = {key.removesuffix(".weight"): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key, value in found.items():
        name, half = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        rows, columns = shapes[name]
        assert value.shape == ((4, columns) if half == "A" else (rows, 4)), key
    assert sum(".experts." in key for key in found) == 2 * 4 * 3 * 2  # layers, experts, maps, halves
    layer = model.base_model.model.model.layers[1].mlp.experts
    assert torch.equal(found["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"],
                       layer.lora_B_up_proj["default"].weight[3])  # fmt: skip
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(OutputError, match="cannot write the adapter"):
        write_for_vllm(model, tmp_path / "adapter")


# ── what is refused when it starts ──


def plain(status: int, text: str):
    return lambda path, body: (status, text)


@pytest.mark.parametrize("options, words", [
    ({"url": "localhost:8000"}, "'localhost:8000' is no address of a server"),
    ({"url": "http://127.0.0.1:9"}, r"127\.0\.0\.1:9/v1/models does not answer \(ConnectError.*start it with .*vllm serve .*--enable-lora"),
    ({"fault": plain(200, "<html>")}, "names no model: it is no vLLM server"),
    ({"fault": plain(200, '{"data": []}')}, "names no model: it is no vLLM server"),
    ({"fault": plain(502, "Bad Gateway")}, "answers 502: Bad Gateway"),
    ({"fault": plain(401, '{"error": "Unauthorized"}')}, "answers 401: Unauthorized; set VLLM_API_KEY"),
    ({"fault": plain(503, '{"error": {"message": "starting"}}')}, "answers 503: starting; start it with"),
    ({"most": 32}, "takes 32 tokens, and prompt and completion may have 64; start it with --max-model-len 64"),
    ({"updates": False}, r"takes no adapters while it runs \(/v1/load_lora_adapter answers 404\); start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ({"mode": "raw_logits"}, "reports logits instead of log-probabilities; start it with --logprobs-mode"),
    ({"mode": "processed_logits"}, "reports logits instead of log-probabilities"),
    ({"mode": "raw_logprobs", "temperature": 1.2}, "of temperature 1, not of 1.2; start it with --logprobs-mode processed_logprobs"),
    ({"temperature": 0.001}, "does not draw at a temperature of 0.001"),
])  # fmt: skip
def test_servers_that_cannot_be_used_are_refused_at_once(start, options, words):
    with pytest.raises(AdapterError, match=words):
        start(**options)


def test_a_gguf_is_refused(tiny_gguf):
    with pytest.raises(AdapterError, match=r"does not read GGUF, and llama-Q4_0\.gguf is one; train on a folder"):
        VllmEngine(open_base(tiny_gguf("llama")), "http://127.0.0.1:9", WINDOW)


def test_the_key_of_the_server_is_given(start, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    heard = []
    answer = Handler.answer
    monkeypatch.setattr(Handler, "answer", lambda self, body: heard.append(self.headers["Authorization"]) or answer(self, body))
    start()
    assert set(heard) == {"Bearer secret"}


# ── what goes wrong later ──


def changed(**fields):
    """A completion with other fields."""
    said = {"token_ids": [7] * 6, "prompt_token_ids": PROMPTS[0], "finish_reason": "length"}
    return 200, {"choices": [{**said, "logprobs": {"token_logprobs": [-1.0] * 6}, **fields}]}


@pytest.mark.parametrize("answer, words", [
    ((200, "<html>"), "answers without token ids and their log-probabilities; it takes vLLM 0.10.2"),
    ((200, {"choices": []}), "answers without token ids"),
    (changed(token_ids=None), "answers without token ids"),
    (changed(logprobs=None), "answers without token ids"),
    (changed(logprobs={"token_logprobs": [None] * 6}), "answers without token ids"),
    (changed(logprobs={"token_logprobs": [-1.0] * 5}), "gives 6 tokens 5 log-probabilities"),
    (changed(logprobs={"token_logprobs": [float("nan")] * 6}), "or some that are no numbers"),
    (changed(prompt_token_ids=[5, 6]), "read other tokens than the prompt has"),
    (changed(finish_reason="abort"), "ended a completion for the reason 'abort'; .*--resume"),
    (changed(finish_reason="stop"), "ended a completion at token 7, which ends none; .*--generation-config vllm"),
    (error(404, "The model `x` does not exist."), "answers 404: The model `x` does not exist.; .*--resume goes on"),
    (error(400, "Token id 9 is out of vocabulary"), "answers 400: Token id 9 is out of vocabulary; change what it names"),
    (error(500, "EngineCore encountered an issue"), "answers 500: EngineCore .*; start the server again, then --resume goes on"),
    (error(503, "overloaded"), "answers 503: overloaded; .*--resume goes on"),
    ("cut", r"cut the connection \(RemoteProtocolError\); .*--resume goes on"),
])  # fmt: skip
def test_an_answer_that_is_wrong_stops_the_run(start, pair, answer, words):
    stub, engine = start()
    stub.fault = lambda path, body: answer if path == "/v1/completions" else None
    with pytest.raises(AdapterError, match=words):
        engine.complete(pair[1], PROMPTS, sampling())


@pytest.mark.parametrize("answer", ["cut", error(503, "busy")])
def test_what_passes_is_tried_again(start, pair, answer):
    stub, engine = start()
    seen = set()

    def once(path, body):
        """The first try of every request fails; of loading, after the adapter was loaded."""
        if (key := (path, json.dumps(body))) in seen:
            return None
        seen.add(key)
        if path == "/v1/load_lora_adapter":
            stub.load(body)
        return answer

    stub.fault = once
    for step in range(2):
        assert gap(pair[1], engine.complete(pair[1], PROMPTS, sampling(step=step))) < 1e-4
    assert len(stub.adapters) == 1


def test_a_server_that_dies_is_said_with_the_way_to_go_on(start, pair):
    stub, engine = start()
    engine.complete(pair[1], PROMPTS, sampling())
    folder = Path(stub.names[0][1])
    stub.stop()
    with pytest.raises(AdapterError, match=r"does not answer \(ConnectError.*; start the server again, then --resume goes on"):
        engine.complete(pair[1], PROMPTS, sampling(step=1))
    engine.close()
    assert not folder.parent.exists()


def test_a_server_that_hangs_is_left_after_a_while(start, pair):
    held = threading.Event()
    stub, engine = start(patience=0.3)
    stub.fault = lambda path, body: held.wait(10) and None if path == "/v1/completions" else None
    try:
        with pytest.raises(AdapterError, match=r"does not answer \(ReadTimeout.*; raise the engine's patience"):
            engine.complete(pair[1], PROMPTS[:2], sampling())
    finally:
        held.set()


def test_the_models_own_settings_on_the_server_are_noticed(start, pair):
    _, engine = start(cap=4)
    with pytest.raises(AdapterError, match="stopped after 4 of 6 tokens; start the server with --generation-config vllm"):
        engine.complete(pair[1], PROMPTS, sampling())


@pytest.mark.parametrize("options, answer, words", [
    ({"ranks": 1}, None, r"load_lora_adapter answers 500: LoRA rank 4 is greater than max_lora_rank 1\.; start it with .*--max-lora-rank 8 "),
    ({}, error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA."), "is not enabled.*; start it with .*--enable-lora"),
    ({}, error(404, "Loading lora a failed: No adapter found for /x"), "No adapter found.*; the server must read .*--server-folder"),
    ({}, error(500, "expected target modules in"), "expected target modules in; the server's log says why"),
])  # fmt: skip
def test_adapters_that_are_not_loaded_stop_the_run(start, pair, tmp_path, options, answer, words):
    stub, engine = start(folder=tmp_path, **options)
    stub.fault = lambda path, body: answer if path == "/v1/load_lora_adapter" else None
    with pytest.raises(AdapterError, match=words):
        engine.complete(pair[1], PROMPTS, sampling())
    engine.close()
    assert not list(tmp_path.iterdir())


def test_adapters_are_written_where_they_are_wanted_for_everyone_to_read(start, pair, tmp_path):
    stub, engine = start(folder=tmp_path / "shared")
    engine.complete(pair[1], PROMPTS[:1], sampling())
    folder = Path(stub.names[0][1])
    assert folder.is_relative_to(tmp_path / "shared")
    (tmp_path / "plain").write_text("")
    assert (folder / "adapter_model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the adapter to .*file"):
        start(folder=tmp_path / "file")[1].complete(pair[1], PROMPTS[:1], sampling())


def test_a_server_of_another_model_is_noticed(start, pair, served):
    stub, engine = start()
    stub.model = copy.deepcopy(served)
    stub.model.lm_head.weight.data = stub.model.lm_head.weight.data.roll(1, 0)
    with pytest.raises(AdapterError, match=r"gives a completion other log-probabilities than llama: \d+\.\d nats a token apart"):
        engine.complete(pair[1], PROMPTS, sampling())


def test_prompts_must_fit_the_window_and_temperatures_the_server(start, pair):
    _, engine = start(mode="raw_logprobs")
    with pytest.raises(AdapterError, match="a prompt of 60 tokens and a completion of 6 exceed the window of 64"):
        engine.complete(pair[1], [[5] * 60], sampling())
    with pytest.raises(AdapterError, match="of temperature 1, not of 0.5"):
        engine.complete(pair[1], PROMPTS, sampling(temperature=0.5))
    with pytest.raises(AdapterError, match=r"answers 400: temperature must be in \[0, 2\], got 2\.5"):
        start()[1].complete(pair[1], PROMPTS, sampling(temperature=2.5))
