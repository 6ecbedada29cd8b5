"""What the Hub reads of a model card: the front matter. Fields: https://huggingface.co/docs/hub/model-cards.

``base_model_relation`` is adapter, merge, quantized or finetune there. The Hub guesses it from the files unless it is said,
and an adapter beside the models would mislead it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from quantkit.errors import PlanError
from quantkit.evaluation.board import clean
from quantkit.evaluation.card.artifact import Artifact
from quantkit.planning.artifact import VERSION_KEY

HUB = r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
PARENTS = r"general\.base_model\.\d+\.(repo_url|url)"
SOURCES = ("general.source.repo_url", "general.source.huggingface.repository", "general.source.url")
OWN_BASE = "a card is about one base: write one for each, or say with --base-model what all were made from"


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


def base_models(artifacts: Sequence[Artifact], given: str | None) -> tuple[list[str], list[str]]:
    """(names on the Hub, notes): as given, else as the GGUFs' metadata say.

    Raises PlanError for a name that is none, or if two files name different bases.
    """
    if given is not None:
        if (name := hub_name(given)) is None:
            raise PlanError(f"--base-model {given!r} is no name on the Hub", hint="give ORG/NAME")
        return [name], []
    found: list[str] = []
    doubt, first = "", ""
    for artifact in artifacts:
        sources = _hub_names(artifact, SOURCES)[:1]
        own = sources or _hub_names(artifact, [key for key in artifact.metadata if re.fullmatch(PARENTS, key)])
        if own and found and own != found:
            why = f"{', '.join(own)}, not {', '.join(found)}"
            raise PlanError(f"{artifact.file_name} is of another base than {first} by its metadata: {why}", hint=OWN_BASE)
        if own and not found:
            found, first = own, artifact.file_name
            doubt = "" if sources else ", which can also be what the original was made from"
    if not found:
        return [], ["the card has no base_model, and the Hub needs it to show what was quantized: give --base-model ORG/NAME"]
    return found, [f"base_model is {', '.join(found)}, as the metadata of {first} say{doubt}; --base-model says otherwise"]


def _hub_names(artifact: Artifact, keys: Sequence[str]) -> list[str]:
    said = [artifact.metadata.get(key) for key in keys]
    return list(dict.fromkeys(name for text in said if isinstance(text, str) and (name := hub_name(text))))


def front_matter(
    artifacts: Sequence[Artifact], bases: Sequence[str], license: str | None, quantized_by: str | None
) -> dict[str, Any]:
    """The fields that the Hub reads, once for all files; what is not known is left out.

    Raises PlanError for a license that is no name, or if two files have different ones.
    """
    by_quantkit = any(artifact.manifests or VERSION_KEY in artifact.metadata for artifact in artifacts)
    weighted = any(key.startswith("quantize.imatrix.") for artifact in artifacts for key in artifact.metadata)
    methods = [artifact.metadata.get("quantization_config", {}).get("quant_method") for artifact in artifacts]
    containers = dict.fromkeys("gguf" if artifact.container == "GGUF" else "safetensors" for artifact in artifacts)
    architectures = [artifact.architecture for artifact in artifacts]
    ends = ["imatrix" if weighted else "", "quantkit" if by_quantkit else ""]
    makers = dict.fromkeys(clean(quantized_by or _said(artifact, "general.quantized_by")) for artifact in artifacts)
    return {
        "base_model": bases[0] if len(bases) == 1 else list(bases) or None,
        "base_model_relation": "quantized",
        "library_name": "gguf" if "gguf" in containers else "transformers",
        **_one_license(artifacts, license),
        "quantized_by": ", ".join(maker for maker in makers if maker) or None,
        "tags": list(dict.fromkeys(clean(t) for t in [*containers, "quantized", *architectures, *methods, *ends] if t)),
    }


def _one_license(artifacts: Sequence[Artifact], given: str | None) -> dict[str, str]:
    if given is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", given):
        raise PlanError(f"--license {given!r} is no license identifier", hint="give one of the Hub's, such as apache-2.0")
    found = [(artifact, own) for artifact in artifacts if (own := _license(artifact, given))]
    for artifact, own in found:
        if own["license"] != found[0][1]["license"]:
            first, one = found[0][0].file_name, found[0][1]["license"]
            raise PlanError(
                f"{artifact.file_name} has the license {own['license']}, {first} {one}", hint="say which with --license"
            )
    return found[0][1] if found else {}


def _license(artifact: Artifact, given: str | None) -> dict[str, str]:
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
