"""A model card (README.md for the Hub) from what a quantized file, its manifest, its plan and its measurements say.

Fields of the front matter: https://huggingface.co/docs/hub/model-cards. Nothing in a card is guessed: what is not
written down somewhere is called not known or not measured.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.analysis.texts import DEFAULT_MIX
from quantkit.checkpoint.files import read_json, refuse_existing, require_folder, write_text
from quantkit.checkpoint.roles import Role
from quantkit.errors import CheckpointError, PlanError
from quantkit.evaluation.board import Row, clean, markdown, read_board, typed
from quantkit.evaluation.card_artifact import Artifact, read_artifact
from quantkit.formats.tensors import tensor_formats
from quantkit.metrics import Divergence
from quantkit.planning.artifact import HASHES, PLAN_NAME, VERSION_KEY
from quantkit.planning.plan import Plan
from quantkit.quantizer.folder_plan import EXPERTS_LOAD, PLAIN_EXPERTS_LOAD
from quantkit.quantizer.manifest import Manifest
from quantkit.quantizer.measured import Measured

TEMPLATE = Path(__file__).parent / "data" / "card.md.jinja"
EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
NEEDS = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "gptq": "GPTQModel and optimum", "awq": "GPTQModel"}  # fmt: skip
HUB = r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
CAVEAT = (
    "Files are named without their folders. A manifest records neither the rules of a plan (--keep, --floor, --formats: they are "
    "in its plan.json) nor the settings of the analysis (--tokens, --probes)."
)
PARENTS = r"general\.base_model\.\d+\.(repo_url|url)"
SOURCES = ("general.source.repo_url", "general.source.huggingface.repository", "general.source.url")


@dataclass(frozen=True)
class CardOptions:
    """What the artifact cannot say itself. base_model: ``ORG/NAME``. board, report: where measurements are, one of them.

    plan: the plan.json that the artifact was written with.
    """

    base_model: str | None = None
    license: str | None = None
    quantized_by: str | None = None
    board: Path | None = None
    report: Path | None = None
    plan: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """One row of a board or a report about the artifact; made: when and by what, if it is known."""

    reference: str
    texts: tuple[str, ...]
    window: int
    runtime: str
    divergence: Divergence
    made: str


def measurements(artifact: Artifact, options: CardOptions) -> list[Measurement]:
    """Of this very file. Raises CheckpointError if the board or report is none, PlanError if both are given."""
    if options.board is not None and options.report is not None:
        raise PlanError("--board and --report exclude each other", hint="give one of them")
    if options.board is not None:
        ranked = [row for rows in read_board(options.board).groups() for row in rows]
        return [_from_row(row) for row in ranked if _is_of(row, artifact)]
    return _from_report(options.report, artifact) if options.report is not None else []


def _is_of(row: Row, artifact: Artifact) -> bool:
    if row.file_bytes != artifact.file_bytes:
        return False
    if row.sha256 is not None and artifact.sha256 is not None:
        return row.sha256 == artifact.sha256
    return artifact.checkpoint is not None and row.identity == artifact.checkpoint.identity


def _from_row(row: Row) -> Measurement:
    device = row.hardware.gpu or row.hardware.machine
    commit = f" (commit {row.commit})" if row.commit else ""
    made = f"{row.reference}, {row.runtime}: {row.date[:10]} on {device}; {_pairs(row.versions)}{commit}"
    return Measurement(row.reference, row.texts, row.window, f"{row.runtime} on {row.device}", row.divergence, made)


def _from_report(path: Path, artifact: Artifact) -> list[Measurement]:
    """A report knows candidates by name and size only."""
    report = read_json(path)
    try:
        if report.get("quantkit_report") != 1:
            raise ValueError("another kind or version")
        reference, runtime = (typed(str, report[key], key) for key in ("reference", "runtime"))
        texts, window = typed(tuple[str, ...], report["texts"], "texts"), typed(int, report["window"], "window")
        versions = _pairs(typed(dict[str, str], report["versions"], "versions"))
        return [
            Measurement(reference, texts, window, runtime, typed(Divergence, c["divergence"], c["name"]), versions)
            for c in typed(list[dict[str, Any]], report["candidates"], "candidates")
            if (c["name"], c["file_bytes"]) == (artifact.path.resolve().name, artifact.file_bytes)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a report of `quantkit compare --json` ({error})", hint="make it again, or use --board"
        ) from None


def hub_name(text: str) -> str | None:
    """``ORG/NAME`` from that or from its address on the Hub, None if it is neither."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = re.sub("^" + HUB, "", text.strip()).rstrip("/")
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if name.count("/") == 1 and name.split("/")[0] not in ("datasets", "spaces"):
            return name
    return None


def base_models(artifact: Artifact, given: str | None) -> tuple[list[str], list[str]]:
    """(names on the Hub, notes): as given, else as the GGUF's metadata say. Raises PlanError for a name that is none."""
    if given is not None:
        if (name := hub_name(given)) is None:
            raise PlanError(f"--base-model {given!r} is no name on the Hub", hint="give ORG/NAME")
        return [name], []
    sources = _hub_names(artifact, SOURCES)[:1]
    found = sources or _hub_names(artifact, [key for key in artifact.metadata if re.fullmatch(PARENTS, key)])
    if not found:
        return [], ["the card has no base_model, and the Hub needs it to show what was quantized: give --base-model ORG/NAME"]
    doubt = "" if sources else ", which can also be what the original was made from"
    return found, [f"base_model is {', '.join(found)}, as the file's metadata say{doubt}; --base-model says otherwise"]


def _hub_names(artifact: Artifact, keys: Sequence[str]) -> list[str]:
    said = [artifact.metadata.get(key) for key in keys]
    return list(dict.fromkeys(name for text in said if isinstance(text, str) and (name := hub_name(text))))


def front_matter(artifact: Artifact, bases: Sequence[str], options: CardOptions) -> dict[str, Any]:
    """The fields that the Hub reads; what is not known is left out. Raises PlanError for a license that is no name."""
    by_quantkit = bool(artifact.manifests) or VERSION_KEY in artifact.metadata
    weighted = any(key.startswith("quantize.imatrix.") for key in artifact.metadata)
    method = artifact.metadata.get("quantization_config", {}).get("quant_method")
    first = "gguf" if artifact.container == "GGUF" else "safetensors"
    tags = [first, "quantized", artifact.architecture, method, "imatrix" if weighted else "", "quantkit" if by_quantkit else ""]
    return {
        "base_model": bases[0] if len(bases) == 1 else list(bases) or None,
        "base_model_relation": "quantized",
        "library_name": "gguf" if artifact.container == "GGUF" else "transformers",
        **_license(artifact, options.license),
        "quantized_by": clean(options.quantized_by or _said(artifact, "general.quantized_by")) or None,
        "tags": [clean(tag) for tag in tags if tag],
    }


def _license(artifact: Artifact, given: str | None) -> dict[str, str]:
    if given is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", given):
        raise PlanError(f"--license {given!r} is no license identifier", hint="give one of the Hub's, such as apache-2.0")
    name = (given or _said(artifact, "general.license")).lower()
    if not name:
        return {}
    more = {f"license_{end}": clean(_said(artifact, f"general.license.{end}")) for end in ("name", "link")}
    if not re.fullmatch(r"[a-z0-9][\w.+-]*", name):
        name, more = "other", more | {"license_name": more["license_name"] or clean(_said(artifact, "general.license"))}
    return {"license": name, **({key: text for key, text in more.items() if text} if name == "other" else {})}


def _said(artifact: Artifact, key: str) -> str:
    value = artifact.metadata.get(key)
    return value if isinstance(value, str) else ""


def fenced(code: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def loaders(artifact: Artifact) -> list[str]:
    """Programs that are documented to load a folder as it is; of experts what transformers does was tried (folder_plan.py)."""
    assert artifact.checkpoint is not None
    known = {fmt.name: fmt for fmt in tensor_formats()}
    used = {tensor.format for tensor in artifact.tensors} & known.keys()
    experts = {info.dtype for info in artifact.checkpoint.tensors.values() if info.role in EXPERTS}
    loads = EXPERTS_LOAD if experts & known.keys() else PLAIN_EXPERTS_LOAD if experts else tuple(known)
    return [
        program
        for program in ("transformers", "vLLM")
        if all(program in known[name].loads_in for name in used) and (program != "transformers" or used <= set(loads))
    ]


def command_of(artifact: Artifact, plan: Path | None) -> str:
    """The command that makes the artifact again, as far as its manifest tells; empty without one."""
    if not artifact.manifests:
        return ""
    manifest = artifact.manifests[0]
    name, budget = str(manifest.plan["name"]), manifest.plan.get("budget") or {}
    words = ["quantkit", "quantize", str(manifest.source["name"])]
    kind, _, mix = name.partition("-")
    analysis: list[str] = []
    if plan is not None:
        words += ["--plan", plan.name]
    elif kind in ("standard", "uniform"):
        words += ["--plan", f"{kind}:{mix}"]
    else:
        words += [*_size_words(budget), *_effort_words(manifest, budget)]
    if artifact.container == "safetensors":
        words += ["--container", "safetensors"]
    elif manifest.importance is None:
        words.append("--no-imatrix")
    elif manifest.importance == "imatrix":
        words += ["--imatrix", "imatrix.gguf"]
    elif manifest.importance != ", ".join(DEFAULT_MIX):
        words += [word for text in manifest.importance.split(", ") for word in ("--calibration", text)]
    elif "--plan" in words:  # which takes the statistics that are there
        analysis = [*words[:1], "analyze", words[2]]
    name = re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", artifact.path.resolve().name)
    return "\n".join(shlex.join(line) for line in (analysis, [*words, "-o", name]) if line)


def _size_words(budget: dict[str, Any]) -> list[str]:
    if "like" in budget and "file_bytes" in budget:
        words = ["--size", str(budget["file_bytes"])]
    else:
        words = [word for key in ("bpw", "size", "like", "fit") if key in budget for word in (f"--{key}", str(budget[key]))]
    pairs = (("context", "--context"), ("kv_type", "--kv-type"), ("adapter_bytes", "--adapter"), ("min_tokens_per_second", "--min-tokens-per-second"))  # fmt: skip
    return words + [word for key, option in pairs if key in budget for word in (option, str(budget[key]))]


def _effort_words(manifest: Manifest, budget: dict[str, Any]) -> list[str]:
    """Efforts leave traces from 3 on (docs/files.md); what is left of 5 is not told from 4 in large models."""
    notes = [note.partition(":")[0].partition(" ")[0] for note in manifest.notes]
    effort = 5 if "measured_kld" in budget else 4 if {"refined", "refining"} & set(notes) else 3 if {"sequential", "encoding"} & set(notes) else 0  # fmt: skip
    return ["--effort", str(effort)] if effort else []


def protections(artifact: Artifact, path: Path | None) -> list[str]:
    """Floors and pinned weights by the plan.json, else what the reasons in the manifest say of super weights.

    Raises PlanError if the plan is not what the artifact was written with.
    """
    if path is None:
        entries = [item for manifest in artifact.manifests for item in manifest.tensors.items()]
        return [f"{name} ({e['format']}) holds a super weight" for name, e in entries if "super weight" in e.get("reason", "")]
    plan, written = Plan.read(path), {tensor.name: tensor.format for tensor in artifact.tensors}
    methods = {name: entry.get("method") for manifest in artifact.manifests for name, entry in manifest.tensors.items()}
    for name in written.keys() | plan.tensors.keys():
        entry = plan.tensors.get(name)
        if entry is None or written.get(name) != entry.format or methods.get(name, entry.method) != entry.method:
            raise PlanError(f"{path} is not the plan of {artifact.path.name}: {name} differs", hint="give the plan.json it was written with")  # fmt: skip
    pins = [f"{name}{list(pin)} is pinned: its block is fitted so that it survives" for name, entry in plan.tensors.items() for pin in entry.pins]  # fmt: skip
    return [*plan.constraints, *pins]


@dataclass(frozen=True)
class Card:
    """The document, and what the user should know about it."""

    text: str
    notes: tuple[str, ...]


def make_card(artifact: Artifact, options: CardOptions) -> Card:
    """Raises CheckpointError or PlanError where an option names something that does not fit."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    bases, notes = base_models(artifact, options.base_model)
    measured = measurements(artifact, options)
    if (source := options.board or options.report) is not None and not measured:
        notes.append(f"{source} holds no numbers of {artifact.path.name}: the card says that it was not measured")
    if not artifact.manifests:
        notes.append(f"{artifact.path.name} has no manifest: the card has no hashes and no command")
    manifest = artifact.manifests[0] if artifact.manifests else None
    plan = dict(manifest.plan) if manifest else {}
    budget = plan.get("budget") or {}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"md": markdown, "fenced": fenced, "pairs": _pairs}
    name = clean(artifact.path.resolve().name)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front=ModelCardData(**front_matter(artifact, bases, options)).to_yaml(), artifact=artifact, bases=bases, measured=measured,
        manifest=manifest, command=command_of(artifact, options.plan), protected=protections(artifact, options.plan),
        plan={"name": plan.get("name"), "predicted_kld": plan.get("predicted_kld"), "budget": _pairs(budget),
              "measured_kld": str(Measured(**plan["measured_kld"])) if plan.get("measured_kld") else ""},
        methods=_methods(artifact), sayings=_sayings(artifact), hashes=HASHES in artifact.metadata, caveat=CAVEAT if plan.get("name", "").startswith("dynamic") and not options.plan else "",
        loaders=loaders(artifact) if artifact.container == "safetensors" else [], python_name=json.dumps(name),
        needs=NEEDS.get(artifact.metadata.get("quantization_config", {}).get("quant_method")),
        shell_name=shlex.quote(f"./{name}" if name.startswith("-") else name),
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    return Card(text.encode("utf-8", "replace").decode(), tuple(notes))


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _methods(artifact: Artifact) -> str:
    found = Counter(entry["method"] for m in artifact.manifests for entry in m.tensors.values() if "method" in entry)
    return ", ".join(f"{name} ({count} tensors)" for name, count in found.most_common())


def _sayings(artifact: Artifact) -> list[str]:
    keys = (PLAN_NAME, VERSION_KEY, *(key for key in artifact.metadata if key.startswith("quantize.imatrix.")))
    return [f"{key}: {artifact.metadata[key]}" for key in keys if key in artifact.metadata]


def write_card(path: Path, out: Path | None, options: CardOptions, *, force: bool = False) -> tuple[Path, Card]:
    """Write the card of an artifact, ``README.md`` beside the file or in the folder unless told; returns where, and the card.

    Raises a QuantkitError if anything does not fit, OutputError if a file is there already and not ``force``; nothing is
    written then.
    """
    artifact = read_artifact(path)
    target = out or (artifact.path if artifact.path.is_dir() else artifact.path.parent) / "README.md"
    require_folder(target)
    refuse_existing(target, force)
    card = make_card(artifact, options)
    write_text(target, card.text)
    return target, card
