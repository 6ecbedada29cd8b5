"""Completions from a vLLM server that runs the base's folder and gets the adapter anew before every step.

Requests and answers are those of vLLM 0.33.0, read in its source. Not yet run against a real vLLM: no GPU here. It takes
0.10.2 or later, where answers have token ids and processed log-probabilities know the temperature.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import shutil
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import GgufCheckpoint
from quantkit.errors import AdapterError, OutputError
from quantkit.rl.base import Base
from quantkit.rl.export import WEIGHTS
from quantkit.rl.rollouts import Completions, Sampling, cut

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a request is sent again
CONNECT = 10.0  # seconds to reach the server
PROBES = 8  # tokens that are asked for at the start, to see what the server reports
APART = 1.0  # nats a token: rounding differs by hundredths, another model by more than this
RESUME = "start the server again, then --resume goes on after the last checkpoint"


@dataclass(frozen=True)
class Answer:
    """value: the JSON document, None if it was none. said: the server's message, for errors."""

    status: int
    value: Any
    said: str


class Server:
    """JSON over HTTP, shared by threads. hint: the way out when the server cannot be reached.

    A connection that is cut and status 503 are tried again, with pauses. ``VLLM_API_KEY`` is the key, if it is set.
    """

    def __init__(self, url: str, patience: float, connections: int, hint: str) -> None:
        self.url, self.hint = url.rstrip("/").removesuffix("/v1"), hint
        if not url.startswith(("http://", "https://")):
            raise AdapterError(f"{url!r} is no address of a server", hint="for example --server http://localhost:8000")
        self._library: Any = importlib.import_module(
            "httpx2" if importlib.util.find_spec("httpx2") else "httpx"  # huggingface_hub brings one of them
        )
        key = os.environ.get("VLLM_API_KEY")
        try:
            self._http = self._library.Client(
                base_url=self.url, timeout=self._library.Timeout(patience, connect=CONNECT), headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=self._library.Limits(max_connections=connections, max_keepalive_connections=connections),
            )  # fmt: skip
        except self._library.InvalidURL as error:
            raise AdapterError(f"{url!r} is no address of a server ({error})", hint="for example http://localhost:8000") from None

    def ask(self, path: str, body: dict[str, Any] | None = None, last: bool = False) -> Answer:
        """The answer to GET, or to POST with a body, whatever its status is. last: one short try.

        Raises AdapterError if there is none.
        """
        httpx = self._library
        options = {"timeout": CONNECT} if last else {}
        for pause in (*(() if last else PAUSES), None):
            try:
                response = self._http.request("GET" if body is None else "POST", path, json=body, **options)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:  # the connection was cut
                problem = f"{self.url}{path} cut the connection ({type(error).__name__})"
            except httpx.HTTPError as error:
                slow = isinstance(error, httpx.ReadTimeout)
                way = "raise the engine's patience, or look at the server's log" if slow else self.hint
                raise AdapterError(f"{self.url}{path} does not answer ({type(error).__name__} {error})", hint=way) from None
            else:
                if response.status_code != 503:
                    return _answer(response)
                problem = f"{self.url}{path} answers 503: {_answer(response).said}"
            if pause is not None:
                time.sleep(pause)
        raise AdapterError(problem, hint=self.hint)

    def refused(self, path: str, answer: Answer, hint: str = "") -> AdapterError:
        """The error for an answer that is not the one wanted."""
        if answer.status in (401, 403):
            hint = "set VLLM_API_KEY to the server's key"
        elif answer.status in (400, 422):
            hint = hint or "change what it names"
        way = hint or self.hint
        return AdapterError(f"{self.url}{path} answers {answer.status}: {answer.said}", hint=way)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _answer(response: Any) -> Answer:
    try:
        value = response.json()
    except ValueError:
        return Answer(response.status_code, None, response.text[:200])
    found = value.get("error", value) if isinstance(value, dict) else value
    said = found.get("message", found.get("detail", found)) if isinstance(found, dict) else found
    return Answer(response.status_code, value, str(said)[:500])


class VllmEngine:
    """A server of the base's folder; its weights are a second copy, in the server's memory.

    Log-probabilities are what the server reports, which is found out at the start. ``raw_logprobs`` (vLLM's default): of
    softmax(logits), before anything is cut off; only for temperature 1. ``processed_logprobs``: of softmax(logits /
    temperature), and with top-k, top-p or min-p of what these leave, so larger by −log of the mass that is left; the
    trainer's correction then weighs a token by that mass. vLLM applies min-p before top-k and top-p, the other engines after.

    The same seeds draw the same completions as far as the server computes the same logits, which depend on its batches
    (``VLLM_BATCH_INVARIANT=1`` makes them equal). The adapter is rounded to the type of the server's activations.

    window: tokens of prompt and completion. temperature: of the run, refused at once where it cannot be. folder: where
    adapters are written for the server, which must see the same path (the same machine, or a shared disk); a temporary one
    unless given. parallel: requests at a time. patience: seconds that a completion may take, waiting included.
    """

    def __init__(self, base: Base, url: str, window: int, *, temperature: float = 1.0, folder: Path | None = None,
                 parallel: int = 128, patience: float = 900.0) -> None:  # fmt: skip
        if isinstance(base.checkpoint, GgufCheckpoint):
            raise AdapterError(
                f"vLLM does not read GGUF, and {base.name} is one",
                hint="train on a folder (`quantkit quantize MODEL --plan uniform:W4A16`), or use --engine llama",
            )
        self._base, self._window, self._parallel = base, window, parallel
        self._run, self._loads = f"quantkit-{uuid.uuid4().hex[:12]}", 0
        self._folder = None if folder is None else folder.resolve() / self._run
        self._step, self._adapter, self._compared = -1, "", False
        start = f"start it with {self._command(16)}"
        self._server = Server(url, patience, parallel, hint=start)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._server.close)
        try:
            self._served = self._require_model()
            self._require_updates()
            self._raw = self._reports_raw()
            self._require_temperature(temperature)
        except BaseException:
            self._stack.close()
            raise
        self._server.hint = RESUME

    def complete(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """One completion for each prompt, in their order; the server batches them.

        Raises AdapterError for prompts that exceed the window, and for whatever the server does not do.
        """
        if (longest := max(map(len, prompts))) + sampling.count > self._window:
            raise AdapterError(
                f"a prompt of {longest} tokens and a completion of {sampling.count} exceed the window of {self._window}",
                hint="raise --max-length, or take shorter prompts",
            )
        self._require_temperature(sampling.temperature)
        self._take(model, sampling.step)
        with ThreadPoolExecutor(min(self._parallel, len(prompts))) as pool:
            jobs = [
                pool.submit(self._one, self._adapter, prompt, sampling.stream(place), sampling)
                for place, prompt in enumerate(prompts)
            ]
            try:
                rows = [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if not self._compared:
            place = max(range(len(rows)), key=lambda n: len(rows[n][0]))
            self._require_same(model, prompts[place], *rows[place], sampling)
            self._compared = True
        return Completions([ids for ids, _ in rows], [values for _, values in rows])

    def close(self) -> None:
        """Take the adapter from the server, if it still answers, and remove its folder."""
        name, self._adapter = self._adapter, ""
        with contextlib.suppress(AdapterError):
            if name:
                self._unload(name, last=True)
        self._stack.close()

    def _command(self, rank: int) -> str:
        """How the server is to be started."""
        fitting = next((most for most in RANKS if most >= rank), rank)
        return (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {self._base.checkpoint.path} --enable-lora --max-lora-rank {fitting} "
            f"--max-model-len {self._window} --logprobs-mode processed_logprobs --generation-config vllm"
        )

    def _require_model(self) -> str:
        """Name of the base on the server. Raises AdapterError if there is none, or for a window that is too short."""
        path = "/v1/models"
        answer = self._server.ask(path)
        if answer.status != 200:
            raise self._server.refused(path, answer)
        cards = answer.value.get("data") if isinstance(answer.value, dict) else None
        try:
            card = next(card for card in cards or [] if not card.get("parent"))
            name, most = str(card["id"]), int(card.get("max_model_len") or self._window)
        except (StopIteration, KeyError, AttributeError, TypeError, ValueError):
            raise AdapterError(f"{self._server.url}{path} names no model: it is no vLLM server", hint=self._server.hint) from None
        if most < self._window:
            raise AdapterError(
                f"{self._server.url} takes {most} tokens, and prompt and completion may have {self._window}",
                hint=f"start it with --max-model-len {self._window}, or lower --max-length",
            )
        return name

    def _require_updates(self) -> None:
        """Raise AdapterError unless adapters can be loaded. Asks for one without a name, which is refused with 400."""
        path = "/v1/load_lora_adapter"
        answer = self._server.ask(path, {"lora_name": "", "lora_path": ""})
        if answer.status in (404, 405):
            raise AdapterError(
                f"{self._server.url} takes no adapters while it runs ({path} answers {answer.status})", hint=self._server.hint
            )
        if answer.status != 400:
            raise self._server.refused(path, answer)

    def _reports_raw(self) -> bool:
        """Whether log-probabilities are those of softmax(logits), whatever is cut off.

        Of the one token that top-k 1 leaves, the processed one is 0 (but for ties). Raises AdapterError for logits.
        """
        size = int(self._base.model.config.vocab_size)
        sampling = Sampling(count=1, temperature=1.0, ends=[], pad=0, top_k=1)
        found = [self._one(self._served, [n * size // PROBES], n, sampling)[1][0] for n in range(PROBES)]
        if max(found) > 1e-3:
            raise AdapterError(
                f"{self._server.url} reports logits instead of log-probabilities",
                hint="start it with --logprobs-mode processed_logprobs",
            )
        return sum(abs(value) < 1e-6 for value in found) * 2 <= len(found)

    def _require_temperature(self, temperature: float) -> None:
        """Raise AdapterError if tokens drawn at a temperature would come without their log-probabilities."""
        if self._raw and temperature != 1:
            raise AdapterError(
                f"{self._server.url} reports log-probabilities of temperature 1, not of {temperature:g}",
                hint="start it with --logprobs-mode processed_logprobs, or leave --temperature at 1",
            )
        if temperature < 0.01:  # vLLM takes 0.01 instead, and says so in its log only
            raise AdapterError(f"vLLM does not draw at a temperature of {temperature:g}", hint="take 0.01 or more")

    def _take(self, model: Any, step: int) -> None:
        """Give the server the adapter of this step.

        Name and folder are new each time: the server's prefix cache knows an adapter by these only.
        """
        if step == self._step:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="quantkit-"))
        if self._loads == 0:
            self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        name, before = f"{self._run}-{self._loads}", self._adapter
        self._loads += 1
        write_for_vllm(model, self._folder / name)
        self._load(name, self._folder / name, int(model.peft_config["default"].r))
        self._step, self._adapter = step, name
        if before:
            self._unload(before)
            shutil.rmtree(self._folder / before, ignore_errors=True)

    def _load(self, name: str, folder: Path, rank: int) -> None:
        path = "/v1/load_lora_adapter"
        answer = self._server.ask(path, {"lora_name": name, "lora_path": str(folder)})
        if answer.status == 200 or "already been loaded" in answer.said:  # a first try whose answer was lost
            return
        if any(words in answer.said for words in ("No adapter found", "No such file", "Permission denied")):
            hint = f"the server must read {folder}: give --server-folder on a disk that both have"
        elif "max_lora_rank" in answer.said or "not enabled" in answer.said:
            hint = f"start it with {self._command(rank)}"
        else:
            hint = "the server's log says why; --engine torch needs no server"
        raise self._server.refused(path, answer, hint)

    def _unload(self, name: str, last: bool = False) -> None:
        path = "/v1/unload_lora_adapter"
        answer = self._server.ask(path, {"lora_name": name}, last)
        if answer.status not in (200, 404):
            raise self._server.refused(path, answer)

    def _one(self, name: str, prompt: list[int], seed: int, sampling: Sampling) -> tuple[list[int], list[float]]:
        """Tokens of one completion and their log-probabilities. name: of the adapter, or of the base."""
        path = "/v1/completions"
        answer = self._server.ask(path, _request(name, prompt, seed, sampling))
        if answer.status == 404:
            hint = "it was started anew, or has several API servers (--api-server-count 1): --resume goes on"
            raise self._server.refused(path, answer, hint)
        if answer.status != 200:
            raise self._server.refused(path, answer)
        try:
            choice = answer.value["choices"][0]
            ids, values = list(choice["token_ids"]), [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError):
            raise AdapterError(
                f"{self._server.url}{path} answers without token ids and their log-probabilities",
                hint="it takes vLLM 0.10.2 or later",
            ) from None
        if problem := _problem(choice, prompt, ids, values, sampling):
            raise AdapterError(f"{self._server.url}{path} {problem[0]}", hint=problem[1])
        return ids, values

    def _require_same(self, model: Any, prompt: list[int], ids: list[int], values: list[float], sampling: Sampling) -> None:
        """Raise AdapterError if the trainer's model gives a completion clearly other log-probabilities: it is another base."""
        import torch

        given = torch.tensor([prompt + ids], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=given, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        shares = torch.log_softmax(logits / sampling.temperature, -1)
        if not self._raw:
            shares = torch.log_softmax(cut(shares, sampling), -1)
        mine = shares.gather(1, given[0, len(prompt) :, None])[:, 0].cpu()
        gaps = (mine - torch.tensor(values)).abs()
        gap = gaps[gaps.isfinite()].mean().item()  # rounding may cut off here what it left there
        if not gap <= APART:
            raise AdapterError(
                f"{self._server.url} gives a completion other log-probabilities than {self._base.name}: {gap:.1f} nats a token apart",
                hint=f"serve the very folder that is trained on, {self._base.checkpoint.path}",
            )


def _request(name: str, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request for one completion. Everything is said, because the server's defaults come from the model's files."""
    return {
        "model": name, "prompt": prompt, "seed": seed, "max_tokens": sampling.count, "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1, "top_p": sampling.top_p, "min_p": sampling.min_p, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": sampling.ends, "ignore_eos": True,
        "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False,
    }  # fmt: skip


def _problem(choice: dict[str, Any], prompt: list[int], ids: list[int], values: list[float], sampling: Sampling) -> tuple[str, str] | None:  # fmt: skip
    """What is wrong with a completion, and the way out."""
    read, reason = choice.get("prompt_token_ids"), choice.get("finish_reason")
    defaults = "start the server with --generation-config vllm: the model's own settings interfere"
    if read is not None and read != prompt:
        return "read other tokens than the prompt has", "serve the very folder that is trained on"
    if not ids or len(values) != len(ids) or not all(map(math.isfinite, values)):
        return f"gives {len(ids)} tokens {len(values)} log-probabilities, or some that are no numbers", "look at the server's log"
    if reason not in ("stop", "length"):
        return f"ended a completion for the reason {reason!r}", RESUME
    if reason == "stop" and ids[-1] not in sampling.ends:
        return f"ended a completion at token {ids[-1]}, which ends none", defaults
    if reason == "length" and len(ids) != sampling.count:
        return f"stopped after {len(ids)} of {sampling.count} tokens", defaults
    return None


def write_for_vllm(model: Any, folder: Path) -> None:
    """Write the adapter "default" of a PEFT model as a folder that vLLM loads. Raises OutputError."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    values = named_for_vllm(get_peft_model_state_dict(model, adapter_name="default"))
    try:
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(save(values))  # save_file would let nobody else read it
        model.peft_config["default"].save_pretrained(str(folder))
    except OSError as error:
        raise OutputError(f"cannot write the adapter to {folder} ({error})", hint="make room, or give another folder") from None


def named_for_vllm(values: dict[str, Any]) -> dict[str, Any]:
    """PEFT's tensors with those of packed experts (experts, …) taken apart, as vLLM names them: ``experts.3.up_proj``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        stem, _, end = key.rpartition(".lora_")
        half, _, part = end.removesuffix(".weight").partition("_")
        plain = value.detach().cpu().contiguous()
        if part:
            out |= {f"{stem}.{number}.{part}.lora_{half}.weight": one.clone() for number, one in enumerate(plain)}
        else:
            out[key] = plain
    return out
