"""The plan: which tensor gets which format, by which method, and why. On disk: plan.json, made to be edited."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.encoders import get_encoder
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError, QuantkitError
from quantkit.formats import get_format

VERSION = 1
Pins = tuple[tuple[int, int], ...]


def read_document(path: Path, hint: str) -> Any:
    """What a JSON file holds. Raises PlanError, with ``hint`` if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    except ValueError as error:
        raise PlanError(f"{path} is not valid JSON ({error})", hint=hint) from None


@dataclass(frozen=True)
class Assignment:
    """What one tensor becomes, and why. pins: row (counted over all experts) and column of weights that must survive."""

    format: str
    method: str = "ggml"
    reason: str = ""
    pins: Pins = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in plan.json; no pins are not mentioned."""
        return {key: value for key, value in asdict(self).items() if key != "pins" or value}


@dataclass
class Plan:
    """tensor → assignment, with the budget it was made for and what it is expected to cost.

    label: llama.cpp's nearest standard label, for the file name and ``general.file_type``.
    use_importance: whether encoders get the activation statistics.
    """

    name: str
    label: str
    identity: str
    tensors: dict[str, Assignment]
    file_bytes: int = 0
    bpw: float = 0.0
    budget: dict[str, Any] = field(default_factory=dict)
    predicted_kld: float | None = None
    use_importance: bool = True
    uncovered_as_ones: bool = False  # experts without statistics: weigh with ones, as llama-quantize does
    constraints: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The document as text, one line per tensor so that it is easy to edit."""
        data = asdict(self)
        data.pop("tensors")
        head = json.dumps({"quantkit_plan": VERSION, **data}, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry.to_json())}" for name, entry in self.tensors.items())
        return f'{head},\n "tensors": {{\n{lines}\n }}\n}}\n'

    @staticmethod
    def read(path: Path) -> Plan:
        """Read a plan.json. Raises PlanError naming what is wrong with it."""
        hint = "correct the file or make it again with `quantkit plan`"
        data = read_document(path, hint)
        if not isinstance(data, dict) or data.pop("quantkit_plan", None) != VERSION:
            raise PlanError(f"{path} is not a plan of this version", hint=hint)
        try:
            raw = data.pop("tensors")
            tensors = {}
            for name, entry in raw.items():
                entry = {"format": entry} if isinstance(entry, str) else dict(entry)
                pins = tuple((row, column) for row, column in entry.pop("pins", ()))
                tensors[name] = Assignment(**entry, pins=pins)
            plan = Plan(tensors=tensors, **data)
            plan._check_types()
            return plan
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PlanError(f"{path} misses or misnames a field ({error})", hint=hint) from None

    def _check_types(self) -> None:
        """Raise TypeError for a field of the wrong kind; the label and name become part of a file name."""
        for value in (self.name, self.label, self.identity):
            if not isinstance(value, str) or "/" in value or value.startswith("."):
                raise TypeError(f"{value!r} is not a plain name")
        for tensor, entry in self.tensors.items():
            if not all(isinstance(part, str) for part in (entry.format, entry.method, entry.reason)):
                raise TypeError(f"{tensor}: format, method and reason are words")
            if not all(isinstance(number, int) for pin in entry.pins for number in pin):
                raise TypeError(f"{tensor}: pins are pairs of row and column")
        if not isinstance(self.use_importance, bool) or not isinstance(self.predicted_kld, float | int | None):
            raise TypeError("use_importance is true or false, predicted_kld a number or null")

    def check_importance(self, stats: ActivationStats | None, given: Collection[str] = ()) -> None:
        """Raise PlanError if a tensor's format or method needs statistics that are missing. given: tensors not to be encoded."""
        for name, entry in self.tensors.items():
            if name in given:
                continue
            if get_encoder(entry.method).needs_moments and (stats is None or stats.moments is None):
                raise PlanError(
                    f"the plan encodes {name} with {entry.method}, and the inputs' second moments are not there",
                    hint="run `quantkit analyze` (not with --imatrix), or change the method to ggml in the plan",
                )
            if not get_format(entry.format).needs_importance:
                continue
            known = stats.tensors.get(name) if stats is not None else None
            hint = "choose another format for it in the plan (IQ1_M and IQ2_S need none), or run `quantkit analyze` on text that reaches it"
            if known is None:
                raise PlanError(f"{name} cannot become {entry.format}: there are no activation statistics for it", hint=hint)
            if known.uncovered and not self.uncovered_as_ones:
                raise PlanError(
                    f"{name} cannot become {entry.format}: no calibration token reached experts {known.uncovered}", hint=hint
                )

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise PlanError unless every tensor has a known format that its rows fit, and the model is the same."""
        hint = "correct the plan or make it again with `quantkit plan`"
        if self.identity and self.identity != checkpoint.identity:
            raise PlanError("the plan was made for another model", hint=hint)
        for name in self.tensors:
            if name not in checkpoint.tensors:
                raise PlanError(f"the plan names {name}, which the model does not have", hint=hint)
        for info in checkpoint.tensors.values():
            if info.name not in self.tensors:
                raise PlanError(f"the plan does not say what becomes of {info.name}", hint=hint)
            entry = self.tensors[info.name]
            try:
                fmt = get_format(entry.format)
                fmt.row_bytes(info.columns)
                encoder = get_encoder(entry.method)
            except QuantkitError as error:
                raise PlanError(f"plan, {info.name}: {error.what}", hint=error.hint or hint) from None
            if not encoder.writes(fmt):
                raise PlanError(f"plan, {info.name}: method {entry.method} does not write {fmt.name}", hint=hint)
            for row, column in entry.pins:
                if not (0 <= row < info.rows and 0 <= column < info.columns):
                    raise PlanError(f"plan, {info.name}: there is no weight {row}, {column} to pin", hint=hint)
            if fmt.is_quantized() and not info.quantizable:
                raise PlanError(f"plan, {info.name}: llama.cpp does not read this tensor as {fmt.name}", hint="use F32")
