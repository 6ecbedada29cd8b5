"""Direct probes: the KL divergence of the model with only one tensor quantized.

Only for models that fit in memory. The original's hidden states before every layer are kept, so that a
probe of layer k runs layers k … end only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.metrics import kl_divergence
from quantkit.modeling.skeleton import materialized_model, parameter_value, set_parameter, tensor_names


class ProbeModel:
    """A model in memory that answers: what does the output lose if these tensors take these values?"""

    def __init__(self, checkpoint: Checkpoint, windows: npt.NDArray[np.int64]) -> None:
        import torch

        self.checkpoint = checkpoint
        self.model = materialized_model(checkpoint)
        self._ids = torch.from_numpy(windows)
        self._parameters: dict[str, list[str]] = {}
        for parameter, _ in self.model.named_parameters():
            if parameter == "lm_head.weight" and checkpoint.tied:
                continue
            for name in tensor_names(checkpoint, parameter):
                self._parameters.setdefault(name, []).append(parameter)
        self._rope = self.model.model.rotary_emb(torch.zeros(1, 1), torch.arange(windows.shape[1]).unsqueeze(0))
        with torch.inference_mode():
            self._before = [self.model.model.embed_tokens(self._ids)]
            for layer in self.model.model.layers:
                self._before.append(self._run(layer, self._before[-1]))
            self._logp = self._logits(self._before[-1]).log_softmax(-1)

    def _run(self, layer: Any, hidden: Any) -> Any:
        out = layer(hidden, attention_mask=None, position_ids=None, position_embeddings=self._rope)
        return out[0] if isinstance(out, tuple) else out

    def _logits(self, hidden: Any) -> Any:
        logits = self.model.lm_head(self.model.model.norm(hidden))
        return logits.reshape(-1, logits.shape[-1])

    def divergence(self, values: dict[str, npt.NDArray[np.float32]]) -> float:
        """Mean KL divergence, nats per token, with the named GGUF tensors replaced by ``values``."""
        return float(self.divergences(values).mean())

    def divergences(self, values: dict[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """KL divergence of every token, float32 (tokens,)."""
        import torch

        originals: dict[str, Any] = {}
        touched = {parameter for name in values for parameter in self._parameters[name]}

        def read(name: str) -> npt.NDArray[np.float32]:
            return values[name] if name in values else self.checkpoint.read(name)

        try:
            for parameter in touched:
                originals[parameter] = self.model.get_parameter(parameter).data
                set_parameter(self.model, parameter, parameter_value(self.checkpoint, parameter, read))
            if self.checkpoint.tied:
                self.model.lm_head.weight = self.model.model.embed_tokens.weight
            with torch.inference_mode():
                return self._forward(self._first_layer(values))
        finally:
            for parameter, original in originals.items():
                set_parameter(self.model, parameter, original)
            if self.checkpoint.tied:
                self.model.lm_head.weight = self.model.model.embed_tokens.weight

    def _first_layer(self, values: dict[str, Any]) -> int | None:
        """The layer from which the result differs; None if the embedding itself changed."""
        if "token_embd.weight" in values:
            return None
        n_layers = len(self.model.model.layers)
        layers = [self.checkpoint.info(name).layer for name in values]
        return min(n_layers if layer is None else layer for layer in layers)

    def _forward(self, first: int | None) -> npt.NDArray[np.float32]:
        hidden = self.model.model.embed_tokens(self._ids) if first is None else self._before[first]
        for layer in self.model.model.layers[first or 0 :]:
            hidden = self._run(layer, hidden)
        return kl_divergence(self._logp, self._logits(hidden)).numpy()
