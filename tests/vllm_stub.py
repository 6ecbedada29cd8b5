"""A stand-in for a vLLM server, written after vLLM 0.33.0: a tiny model of transformers in torch, into whose weights it adds
the adapter folders that it is told to load.
"""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

WINDOW = 64


class Stub(ThreadingHTTPServer):
    """vLLM's API server. fault: (path, body) → an answer in place of the true one, ``"cut"``, or None."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, model, mode="processed_logprobs", updates=True, most=WINDOW, ranks=16, cap=None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.mode, self.updates, self.most, self.ranks, self.cap = model, mode, updates, most, ranks, cap
        self.adapters, self.names, self.asked, self.open = {}, [], [], []
        self.fault, self.barrier, self.busy, self.busiest, self.lock = lambda path, body: None, None, 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """As if its process died: open connections are cut."""
        self.shutdown()
        self.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def models(self, body) -> tuple[int, object]:
        cards = [{"id": "tiny", "root": "/models/tiny", "parent": None, "max_model_len": self.most}]
        return 200, {"object": "list", "data": cards + [{"id": name, "parent": "tiny"} for name in self.adapters]}

    def load(self, body) -> tuple[int, object]:
        name, path = body["lora_name"], body["lora_path"]
        if not name or not path:
            return error(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path, "adapter_config.json").exists():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        config = json.loads(Path(path, "adapter_config.json").read_text())
        if config["r"] > self.ranks:
            return error(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.ranks}.")
        self.adapters[name] = merged(self.model, Path(path), config)
        self.names.append((name, path))
        return 200, "Success"

    def unload(self, body) -> tuple[int, object]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    def complete(self, body) -> tuple[int, object]:
        model = self.model if body["model"] == "tiny" else self.adapters.get(body["model"])
        if model is None:
            return error(404, f"The model `{body['model']}` does not exist.")
        if not 0 <= body["temperature"] <= 2:
            return error(400, f"temperature must be in [0, 2], got {body['temperature']}.")
        if self.barrier is not None:
            self.barrier.wait(10)
        draw, ids, values, reason = torch.Generator().manual_seed(body["seed"]), [], [], "length"
        ends = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else {model.config.eos_token_id})
        most = min(body["max_tokens"], self.cap or self.most, self.most - len(body["prompt"]))
        while len(ids) < most and reason == "length":
            with torch.no_grad():
                logits = model(torch.tensor([body["prompt"] + ids])).logits[0, -1]
            token, value = sampled(logits, body, draw, self.mode)
            ids.append(token)
            values.append(max(value, -9999.0))
            reason = "stop" if token in ends else reason
        said = {"token_logprobs": values, "tokens": [f"token_id:{token}" for token in ids]}
        more = {"token_ids": ids, "prompt_token_ids": body["prompt"]} if body.get("return_token_ids") else {}
        return 200, {"choices": [{"index": 0, "text": "", "logprobs": said, "finish_reason": reason, **more}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body) -> None:
        stub: Stub = self.server
        routes = {"/v1/models": stub.models, "/v1/completions": stub.complete}
        if stub.updates:
            routes |= {"/v1/load_lora_adapter": stub.load, "/v1/unload_lora_adapter": stub.unload}
        with stub.lock:
            stub.asked.append((self.path, body))
            stub.open.append(self.connection)
            stub.busy += 1
            stub.busiest = max(stub.busiest, stub.busy)
        found = stub.fault(self.path, body) or routes.get(self.path, lambda body: (404, {"detail": "Not Found"}))(body)
        with stub.lock:
            stub.busy -= 1
        if found == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        raw = (found[1] if isinstance(found[1], str) else json.dumps(found[1])).encode()
        self.send_response(found[0])
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *ignored) -> None:
        """Quiet."""


def error(status: int, message: str) -> tuple[int, object]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": status}}


def merged(model, folder: Path, config):
    """The model with an adapter's products in its weights."""
    out, values = copy.deepcopy(model), load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for key in values:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            out.get_submodule(name).weight.data += scale * values[key.replace(".lora_A.", ".lora_B.")] @ values[key]
    return out


def sampled(logits, body, draw, mode) -> tuple[int, float]:
    """vLLM's steps: temperature, min-p, top-k, top-p, an exponential race; and what each mode reports of the token."""
    left = logits / body["temperature"]
    if body["min_p"]:
        left = left.masked_fill(left < left.max() + np.log(body["min_p"]), -torch.inf)
    if body["top_k"] > 0:
        left = left.masked_fill(left < left.topk(body["top_k"]).values[-1], -torch.inf)
    if body["top_p"] < 1:
        ordered, places = left.sort()
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - body["top_p"]
        gone[-1] = False
        left = left.masked_fill(torch.zeros_like(gone).scatter(0, places, gone), -torch.inf)
    token = int((left.softmax(-1) / torch.empty_like(left).exponential_(generator=draw)).argmax())
    values = {"raw_logits": logits, "raw_logprobs": logits.log_softmax(-1), "processed_logits": left, "processed_logprobs": left.log_softmax(-1)}  # fmt: skip
    return token, float(values[mode][token])


# ── fixtures ──
