"""Names the pre-tokenizer of a BPE vocabulary the way llama.cpp does (``tokenizer.ggml.pre``).

The name is found from the definition in tokenizer.json: the sequence of splits, digits and byte-level
steps is compared with the definitions of llama.cpp's types (src/llama-vocab.cpp), kept as data in
pretokenizers.json. A newly trained vocabulary with a known pre-tokenizer therefore works; a hash of a
known vocabulary is not needed.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

# Names of llama.cpp that split like another one (src/llama-vocab.cpp).
SYNONYMS = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo", "solar-open", "grok-2"), "qwen2"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4", "modern-bert", "trillion"), "gpt-2"),
    **dict.fromkeys(("smollm", "refact", "command-r", "codeshell", "exaone"), "starcoder"),
}  # fmt: skip


def steps_of(definition: dict[str, Any] | None) -> list[list[Any]]:
    """Flatten a ``pre_tokenizer`` object of tokenizer.json into comparable steps."""
    if definition is None:
        return []
    kind = definition.get("type")
    if kind == "Sequence":
        return [step for inner in definition["pretokenizers"] for step in steps_of(inner)]
    if kind == "Split":
        pattern = definition["pattern"]
        return [["split", pattern.get("Regex") or pattern.get("String")]]
    if kind == "ByteLevel":
        return [["bytelevel", definition.get("use_regex", True), definition.get("add_prefix_space", True)]]
    if kind == "Digits":
        return [["digits", definition.get("individual_digits", False)]]
    return [[str(kind).lower()]]


@cache
def _known() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / "pretokenizers.json").read_text())


def identify(tokenizer: dict[str, Any]) -> tuple[str, bool]:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, and whether it splits exactly alike.

    Raises CheckpointError if no type of llama.cpp has this definition: a wrong name would change the
    tokens silently.
    """
    steps = steps_of(tokenizer.get("pre_tokenizer"))
    ignore = bool(tokenizer["model"].get("ignore_merges", False))
    matches = [row for row in _known() if row["steps"] == steps]
    matches.sort(key=lambda row: row["ignore_merges"] != ignore)
    if matches and (matches[0]["ignore_merges"] == ignore or not ignore):
        return matches[0]["pre"], matches[0]["exact"] and matches[0]["ignore_merges"] == ignore
    raise CheckpointError(
        f"tokenizer.json has a pre-tokenizer that llama.cpp does not know: {json.dumps(steps)[:200]}",
        hint="name one of llama.cpp's types with --pre-tokenizer if you know that it splits alike",
    )


def definition_of(name: str) -> dict[str, Any]:
    """The steps of one of llama.cpp's pre-tokenizers, to rebuild it from a GGUF file.

    Raises CheckpointError if quantkit has no definition of that name.
    """
    name = SYNONYMS.get(name, name)
    for row in _known():
        if row["pre"] == name:
            return row
    raise CheckpointError(f"no definition of the pre-tokenizer {name!r}", hint="use the Hugging Face folder of the model")
