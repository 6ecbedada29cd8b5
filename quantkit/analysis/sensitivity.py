"""What each tensor costs in each format: the error the real encoder leaves, and the KL it causes.

``Sensitivity`` is what the planner reads; on disk it is ``analysis.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError

VERSION = 5


@dataclass
class FormatCost:
    """One tensor in one format.

    weight_error: ‖ΔW‖²/‖W‖². activation_error: the same of the layer's outputs, E‖ΔWx‖²/E‖Wx‖², with the
    second moments E[xxᵀ] (their diagonal where no more was kept). method: the encoder that left the least. fisher_kld, probe_kld: KL divergence in nats per token by either estimator;
    search_kld: Fisher's for ggml's search alone. predicted_kld: what the planner uses.
    """

    weight_error: float
    activation_error: float
    fisher_kld: float
    probe_kld: float | None = None
    search_kld: float | None = None
    predicted_kld: float = 0.0
    method: str = "ggml"


@dataclass
class TensorSensitivity:
    """Everything the analysis knows about one tensor."""

    role: str
    layer: int | None
    shape: tuple[int, ...]
    kurtosis: float
    outlier_channels: int
    formats: dict[str, FormatCost]
    uncovered_experts: list[int] = field(default_factory=list)
    input_peak: float = 0.0
    input_rms: float = 0.0
    output_peak: float = 0.0
    int8_activation_error: float | None = None
    fp8_activation_error: float | None = None


@dataclass
class Sensitivity:
    """The analysis of one model: read and written as analysis.json."""

    model: str
    architecture: str
    identity: str
    estimator: str
    calibration: dict[str, Any]
    tensors: dict[str, TensorSensitivity]
    super_weights: list[dict[str, Any]] = field(default_factory=list)
    schemes: list[dict[str, Any]] = field(default_factory=list)
    composition: tuple[float, float] = (1.0, 1.0)
    coverage: list[dict[str, Any]] = field(default_factory=list)  # Coverage.to_json of every layer with routed experts
    neighbours: list[dict[str, Any]] = field(default_factory=list)  # pairs of tensors, alone and together (neighbours.py)
    groups: list[dict[str, Any]] = field(default_factory=list)  # Group.to_json, for models that are not probed

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps({"quantkit_analysis": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str, source: str) -> Sensitivity:
        """Parse an analysis.json. Raises CalibrationError naming ``source`` if it is not one."""
        hint = "run `quantkit analyze` again"
        try:
            data = json.loads(text)
            if data.pop("quantkit_analysis") != VERSION:
                raise CalibrationError(f"{source} was written by another version of quantkit", hint=hint)
            tensors = {}
            for name, entry in data.pop("tensors").items():
                formats = {f: FormatCost(**cost) for f, cost in entry.pop("formats").items()}
                entry["shape"] = tuple(entry["shape"])
                tensors[name] = TensorSensitivity(formats=formats, **entry)
            data["composition"] = tuple(data["composition"])
            return Sensitivity(tensors=tensors, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{source} is not an analysis ({error})", hint=hint) from None

    @staticmethod
    def read(path: Path) -> Sensitivity:
        """Read analysis.json. Raises CalibrationError if it is missing or damaged."""
        if not path.exists():
            raise CalibrationError(f"{path} does not exist", hint="run `quantkit analyze` first")
        return Sensitivity.from_json(path.read_text(encoding="utf-8"), str(path))
