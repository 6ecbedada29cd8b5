"""How the file of a model card was made: the command, what its plan protects, and which programs load it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.analysis.texts import DEFAULT_MIX
from quantkit.checkpoint.roles import Role
from quantkit.errors import PlanError
from quantkit.evaluation.card.artifact import Artifact
from quantkit.formats.tensors import tensor_formats
from quantkit.planning.artifact import PLAN_NAME, VERSION_KEY
from quantkit.planning.plan import Plan
from quantkit.quantizer.folder_plan import EXPERTS_LOAD, PLAIN_EXPERTS_LOAD
from quantkit.quantizer.manifest import Manifest

EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


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
    name = re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", artifact.file_name)
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


def plans_of(artifacts: Sequence[Artifact], paths: Sequence[Path]) -> dict[Path, Path]:
    """Which of the plan.json files each artifact was written with, by the artifact's path.

    Raises PlanError if a plan is that of none of them.
    """
    out: dict[Path, Path] = {}
    for path in paths:
        plan = Plan.read(path)
        wrong = {artifact.path: difference(plan, artifact) for artifact in artifacts}
        out |= {there: path for there, name in wrong.items() if name is None}
        if None not in wrong.values():
            said = "; ".join(f"{artifact.file_name}: {wrong[artifact.path]} differs" for artifact in artifacts)
            raise PlanError(f"{path} is not the plan of {said}", hint="give the plan.json it was written with")
    return out


def difference(plan: Plan, artifact: Artifact) -> str | None:
    """The first tensor that the plan has otherwise than the artifact, None if there is none."""
    written = {tensor.name: tensor.format for tensor in artifact.tensors}
    methods = {name: entry.get("method") for manifest in artifact.manifests for name, entry in manifest.tensors.items()}
    for name in sorted(written.keys() | plan.tensors.keys()):
        entry = plan.tensors.get(name)
        if entry is None or written.get(name) != entry.format or methods.get(name, entry.method) != entry.method:
            return name
    return None


def protections(artifact: Artifact, path: Path | None) -> list[str]:
    """Floors and pinned weights by the plan.json, else what the reasons in the manifest say of super weights."""
    if path is None:
        entries = [item for manifest in artifact.manifests for item in manifest.tensors.items()]
        return [f"{name} ({e['format']}) holds a super weight" for name, e in entries if "super weight" in e.get("reason", "")]
    plan = Plan.read(path)
    pins = [f"{name}{list(pin)} is pinned: its block is fitted so that it survives" for name, entry in plan.tensors.items() for pin in entry.pins]  # fmt: skip
    return [*plan.constraints, *pins]


def methods(artifact: Artifact) -> str:
    """How its tensors were encoded, in words."""
    found = Counter(entry["method"] for m in artifact.manifests for entry in m.tensors.values() if "method" in entry)
    return ", ".join(f"{name} ({count} tensors)" for name, count in found.most_common())


def sayings(artifact: Artifact) -> list[str]:
    """What a GGUF says of its making without a manifest."""
    keys = (PLAN_NAME, VERSION_KEY, *(key for key in artifact.metadata if key.startswith("quantize.imatrix.")))
    return [f"{key}: {artifact.metadata[key]}" for key in keys if key in artifact.metadata]
