"""A model card (README.md for the Hub) of one or many quantized files: what they, their manifests and measurements say.

Nothing in a card is guessed: what is not written down somewhere is called not known or not measured.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantkit.checkpoint.files import refuse_existing, require_folder, write_text
from quantkit.evaluation.board import clean, markdown
from quantkit.evaluation.card.artifact import Artifact
from quantkit.evaluation.card.collection import Collection, Place, default_target, places, read_collection
from quantkit.evaluation.card.hub import base_models, front_matter
from quantkit.evaluation.card.made import command_of, loaders, methods, plans_of, protections, sayings
from quantkit.evaluation.card.numbers import Measurement, best_for_size, common_setting, measurements, pairs
from quantkit.planning.artifact import HASHES
from quantkit.quantizer.manifest import Manifest
from quantkit.quantizer.measured import Measured

TEMPLATE = Path(__file__).parent / "data" / "card.md.jinja"
NEEDS = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "gptq": "GPTQModel and optimum", "awq": "GPTQModel"}  # fmt: skip
CAVEAT = (
    "Files are named without their folders. A manifest records neither the rules of a plan (--keep, --floor, --formats: they are "
    "in its plan.json) nor the settings of the analysis (--tokens, --probes)."
)


@dataclass(frozen=True)
class CardOptions:
    """What the artifacts cannot say themselves. base_model: ``ORG/NAME``. board, report: where measurements are, one of them.

    plans: the plan.json files that they were written with.
    """

    base_model: str | None = None
    license: str | None = None
    quantized_by: str | None = None
    board: Path | None = None
    report: Path | None = None
    plans: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Card:
    """The document, and what the user should know about it."""

    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What a card tells of one artifact. measured: all rows about it; shown: the one in the setting of the table."""

    artifact: Artifact
    place: Place
    measured: Sequence[Measurement]
    shown: Measurement | None
    plan_file: Path | None

    @property
    def manifest(self) -> Manifest | None:
        """Of the file, or of the first part of a split one."""
        return self.artifact.manifests[0] if self.artifact.manifests else None

    @property
    def plan(self) -> dict[str, Any]:
        """By the manifest: name, prediction, budget in words, measurement in words."""
        said = self.manifest.plan if self.manifest else {}
        measured = str(Measured(**said["measured_kld"])) if said.get("measured_kld") else ""
        return {
            "name": said.get("name"), "predicted_kld": said.get("predicted_kld"), "budget": pairs(said.get("budget") or {}),
            "measured_kld": measured,
        }  # fmt: skip

    @property
    def command(self) -> str:
        """What makes it again."""
        return command_of(self.artifact, self.plan_file)

    @property
    def caveat(self) -> str:
        """What the command does not tell."""
        return CAVEAT if str(self.plan["name"]).startswith("dynamic") and self.plan_file is None else ""

    @property
    def protected(self) -> list[str]:
        """What its plan protects."""
        return protections(self.artifact, self.plan_file)

    @property
    def methods(self) -> str:
        """How it was encoded."""
        return methods(self.artifact)

    @property
    def sayings(self) -> list[str]:
        """What the file itself says."""
        return sayings(self.artifact)

    @property
    def hashes(self) -> bool:
        """Whether the file carries hashes of its tensors."""
        return HASHES in self.artifact.metadata

    @property
    def loaders(self) -> list[str]:
        """Programs that load a folder."""
        return loaders(self.artifact) if self.artifact.container == "safetensors" else []

    @property
    def needs(self) -> str | None:
        """Packages that transformers needs for a folder."""
        return NEEDS.get(self.artifact.metadata.get("quantization_config", {}).get("quant_method"))


def make_card(collection: Collection, options: CardOptions, folder: Path) -> Card:
    """The card as it lies in ``folder``. Raises CheckpointError or PlanError where an option names something that does not fit."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    artifacts = collection.artifacts
    bases, notes = base_models(artifacts, options.base_model)
    found = measurements(artifacts, options.board, options.report)
    setting, plans, where = common_setting(found), plans_of(artifacts, options.plans), places(collection, folder)
    parts = [
        Part(artifact, where[artifact.path], own, next((m for m in own if m.setting == setting), None), plans.get(artifact.path))
        for artifact, own in zip(artifacts, found, strict=True)
    ]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {
        "md": markdown, "fenced": fenced, "pairs": pairs, "html": shown_by_html, "link": link, "shell": shell_name, "python": python_name,
    }  # fmt: skip
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front=ModelCardData(**front_matter(artifacts, bases, options.license, options.quantized_by)).to_yaml(),
        title=_title(artifacts, bases), bases=bases, parts=parts, best=_best(parts),
        shown=next((part.shown for part in parts if part.shown), None),
        companions=[(companion, where[companion.path]) for companion in collection.companions],
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    return Card(text.encode("utf-8", "replace").decode(), (*notes, *_missing(parts, options.board or options.report)))


def _title(artifacts: Sequence[Artifact], bases: Sequence[str]) -> str:
    if len(artifacts) == 1:
        return artifacts[0].name
    return f"{bases[0].split('/')[1] if len(bases) == 1 else artifacts[0].model}, quantized"


def _best(parts: Sequence[Part]) -> list[Part]:
    """Files that are best for their size, smallest first, if there is a choice: at least two were measured alike."""
    known = [part for part in parts if part.shown is not None]
    sizes = [(part.artifact.file_bytes, part.shown.divergence.mean_kld) for part in known if part.shown is not None]
    return [known[place] for place in best_for_size(sizes)] if len(known) > 1 else []


def _missing(parts: Sequence[Part], source: Path | None) -> list[str]:
    """What the user should know is not in the card."""
    notes = []
    for part in parts:
        name = part.artifact.file_name
        if source is not None and not part.measured:
            notes.append(f"{source} holds no numbers of {name}: the card says that it was not measured")
        elif source is not None and part.shown is None:
            notes.append(f"{name} was measured in another setting than most: its numbers stand below the table only")
        if part.manifest is None:
            notes.append(f"{name} has no manifest: the card has no hashes and no command")
    return notes


def fenced(code: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def shown_by_html(text: str) -> str:
    """Text that stays what it is inside an HTML element, where Markdown's escapes would be seen; no formula on the Hub either."""
    return html.escape(clean(text)).replace("$", "&#36;").replace("\\", "&#92;")


def link(place: Place) -> str:
    """A link to a file of the repository, whatever its name: nothing in it is an address elsewhere or ends the link."""
    return f"[{markdown(place.name)}]({quote(os.fsencode(place.file))})"


def shell_name(place: Place) -> str:
    """A file as a word for a shell, and no option."""
    name = clean(place.name)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def python_name(place: Place) -> str:
    """A file as a string of Python."""
    return json.dumps(clean(place.name))


def write_card(paths: Sequence[Path], out: Path | None, options: CardOptions, *, force: bool = False) -> tuple[Path, Card]:
    """Write the card of artifacts of one base and what goes with them; returns where, and the card.

    Where: ``README.md`` beside the files if they share a folder, or in the one folder. Raises a QuantkitError if anything
    does not fit, OutputError if the files share no folder and ``out`` is not given, or if a file is there already and not
    ``force``; nothing is written then.
    """
    collection = read_collection(paths)
    target = out or default_target(collection)
    require_folder(target)
    refuse_existing(target, force)
    card = make_card(collection, options, target.parent)
    write_text(target, card.text)
    return target, card
