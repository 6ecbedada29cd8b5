"""Completions from llama.cpp, which runs the base's own file and gets the adapter anew before every step."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint import GgufCheckpoint
from quantkit.checkpoint.adapter import write_adapter
from quantkit.errors import AdapterError
from quantkit.evaluation.runners import open_llama
from quantkit.rl.base import Base
from quantkit.rl.export import lora_of
from quantkit.rl.rollouts import Completions, Sampling, cut


class LlamaEngine:
    """The file is opened once, with a window of prompt and completion; a group's prompt is read once.

    Its weights are a second copy (mapped from the file, so shared with whoever else maps it); llama.cpp rounds
    activations, which is the mismatch that the trainer corrects.
    """

    def __init__(self, base: Base, window: int) -> None:
        checkpoint = base.checkpoint
        plain = all(info.dtype in checkpoint.plain_types for info in checkpoint.tensors.values())
        if not plain and not isinstance(checkpoint, GgufCheckpoint):
            raise AdapterError(f"llama.cpp cannot read the folder {base.name}", hint="use --engine torch")
        self._base, self._window = base, window
        self._stack, self._step = contextlib.ExitStack(), -1
        self._llama: Any = None
        self._adapter: Any = None

    def complete(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """One completion for each prompt, one after the other. Raises AdapterError for prompts that exceed the window."""
        import torch

        if (longest := max(map(len, prompts))) + sampling.count > self._window:
            raise AdapterError(
                f"a prompt of {longest} tokens and a completion of {sampling.count} exceed the window of {self._window}",
                hint="raise --max-length, or take shorter prompts",
            )
        self._take(model, sampling.step)
        ids: list[list[int]] = []
        scores: list[list[float]] = []
        for place, prompt in enumerate(prompts):
            row, values = self._one(prompt, torch.Generator().manual_seed(sampling.stream(place)), sampling)
            ids.append(row)
            scores.append(values)
        return Completions(ids, scores)

    def close(self) -> None:
        """Free the model."""
        self._stack.close()
        self._llama = None

    def _one(self, prompt: list[int], draw: Any, sampling: Sampling) -> tuple[list[int], list[float]]:
        import torch

        llama = self._llama
        if llama.n_tokens < len(prompt) or llama.input_ids[: len(prompt)].tolist() != prompt:
            llama.n_tokens = 0
            llama.eval(prompt[:-1])
        llama.n_tokens = len(prompt) - 1  # the last token again, for its logits
        token, row, values = prompt[-1], [], []
        for _ in range(sampling.count):
            llama.eval([token])
            logits = torch.from_numpy(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy())
            shares = torch.log_softmax(logits / sampling.temperature, -1)
            token = int(torch.multinomial(cut(shares[None], sampling)[0].exp(), 1, generator=draw))
            row.append(token)
            values.append(float(shares[token]))
            if token in sampling.ends:
                break
        return row, values

    def _take(self, model: Any, step: int) -> None:
        """Open the file, and give it the adapter of this step."""
        from llama_cpp import llama_cpp as lib
        from peft import get_peft_model_state_dict

        if self._llama is None:
            self._llama = self._stack.enter_context(open_llama(self._base.checkpoint, self._window))
        if step == self._step:
            return
        config = model.peft_config["default"].to_dict()
        values = {
            name: value.detach().float().cpu().numpy()
            for name, value in get_peft_model_state_dict(model, adapter_name="default").items()
        }
        lora = lora_of(values, config, self._base.checkpoint, "the adapter")
        with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
            path = Path(folder, "adapter.gguf")
            write_adapter(path, self._base.checkpoint.family.arch, lora.pairs, lora.alpha, "F32")
            fresh = lib.llama_adapter_lora_init(self._llama._model.model, str(path).encode())
        if fresh is None:
            raise AdapterError("llama.cpp does not take the adapter", hint="use --engine torch")
        lib.llama_set_adapters_lora(
            self._llama._ctx.ctx, (lib.llama_adapter_lora_p_ctypes * 1)(fresh), 1, (ctypes.c_float * 1)(1.0)
        )
        if self._adapter is not None:
            lib.llama_adapter_lora_free(self._adapter)
        self._adapter, self._step = fresh, step
        self._llama.n_tokens = 0  # what was read with the old adapter counts no more
