"""The vocabulary of a Hugging Face model as GGUF metadata.

Two kinds: byte-level BPE (``tokenizer.ggml.model = gpt2``) from tokenizer.json, and SentencePiece
(``llama``) from tokenizer.model, or from a tokenizer.json whose BPE falls back to bytes. Token types and
keys follow llama.cpp (gguf-py/gguf/constants.py, TokenType; src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.files import read_json
from quantkit.checkpoint.pretokenizer import identify
from quantkit.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PAD_SCORE = -1000.0
# Tokens that llama.cpp's converter takes for control tokens by their spelling.
LOOKS_SPECIAL = r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]"
SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token", "padding": "pad_token", "mask": "mask_token"}  # fmt: skip


@dataclass
class Vocabulary:
    """Tokens by id with their type and, for SentencePiece, their score."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None


def _load(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def tokenizer_metadata(folder: Path, config: dict[str, Any], pre_tokenizer: str | None = None) -> gv.Metadata:
    """All ``tokenizer.*`` keys for a model folder.

    Raises CheckpointError if there is no tokenizer, it is of an unknown kind, or its pre-tokenizer is
    unknown to llama.cpp and not named.
    """
    size = int(config["vocab_size"])
    fast, settings = _load(folder / "tokenizer.json"), _load(folder / "tokenizer_config.json")
    out: gv.Metadata = {}
    if (folder / "tokenizer.model").exists():
        vocabulary = _sentencepiece(folder / "tokenizer.model", fast, settings, size)
        _sentencepiece_keys(out, vocabulary, settings)
    elif not fast:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor tokenizer.model", hint="download the tokenizer's files too"
        )
    elif (
        not isinstance(fast.get("model"), dict) or not isinstance(fast["model"].get("vocab"), dict) or not fast["model"]["vocab"]
    ):
        raise CheckpointError("tokenizer.json has no vocabulary", hint="download the file again")
    elif fast["model"].get("type") != "BPE":
        kind = fast["model"].get("type")
        raise CheckpointError(f"tokenizer.json holds a {kind} model", hint="quantkit writes BPE and SentencePiece vocabularies")
    elif fast["model"].get("byte_fallback"):
        vocabulary = _byte_fallback(fast, size)
        _sentencepiece_keys(out, vocabulary, settings)
    else:
        vocabulary = _byte_level(fast, size)
        out["tokenizer.ggml.model"] = gv.string("gpt2")
        out["tokenizer.ggml.pre"] = gv.string(pre_tokenizer or identify(fast)[0])
        out["tokenizer.ggml.tokens"] = gv.array(gv.STRING, vocabulary.tokens)
        out["tokenizer.ggml.token_type"] = gv.array(gv.I32, vocabulary.types)
        out["tokenizer.ggml.merges"] = gv.array(gv.STRING, _merges(fast))
    _refuse_duplicates(vocabulary)
    _special_keys(out, vocabulary, fast, settings, config)
    template = _chat_template(folder, settings)
    if template:
        out["tokenizer.chat_template"] = gv.string(template)
    return out


def _refuse_duplicates(vocabulary: Vocabulary) -> None:
    """llama.cpp aborts the process if two ids have the same text."""
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(vocabulary.tokens):
            if token in seen:
                raise CheckpointError(
                    f"tokens {seen[token]} and {i} are both {token!r}", hint="llama.cpp cannot load such a vocabulary"
                )
            seen[token] = i


def _byte_level(fast: dict[str, Any], size: int) -> Vocabulary:
    by_id = {int(i): token for token, i in fast["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    for added in fast.get("added_tokens", ()):
        by_id[added["id"]] = added["content"]
        special = added.get("special") or re.fullmatch(LOOKS_SPECIAL, added["content"])
        types[added["id"]] = CONTROL if special else USER_DEFINED
    if max(by_id) >= size:
        raise CheckpointError(
            f"tokenizer.json has token {max(by_id)} but config.json says vocab_size {size}",
            hint="the two files belong to different models",
        )
    return Vocabulary([by_id.get(i, f"[PAD{i}]") for i in range(size)], [types.get(i, UNUSED) for i in range(size)])


def _merges(fast: dict[str, Any]) -> list[str]:
    """Merges as ``left right``; spaces inside a part, which the separator forbids, become Ġ's sign."""
    merges = fast["model"].get("merges", [])
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]


def _sentencepiece(path: Path, fast: dict[str, Any], settings: dict[str, Any], size: int) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model ({error})", hint="download the file again") from None
    count = model.vocab_size()
    tokens = [model.IdToPiece(i) for i in range(count)]
    scores = [model.GetScore(i) for i in range(count)]
    types = []
    for i in range(count):
        kind = UNKNOWN if model.IsUnknown(i) else CONTROL if model.IsControl(i) else UNUSED if model.IsUnused(i) else NORMAL
        types.append(BYTE if model.IsByte(i) else kind)
    vocabulary = Vocabulary(tokens[:size], types[:size], scores[:size])
    for i in range(count, size):
        vocabulary.tokens.append(f"[PAD{i}]")
        vocabulary.types.append(UNUSED)
        vocabulary.scores.append(PAD_SCORE)  # type: ignore[union-attr]
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    added.update({token["id"]: token for token in fast.get("added_tokens", ())})
    for i, token in added.items():
        if i < size and vocabulary.types[i] not in (UNKNOWN, CONTROL, BYTE):
            vocabulary.tokens[i] = token["content"]
            vocabulary.types[i] = CONTROL if token.get("special") else USER_DEFINED
            vocabulary.scores[i] = PAD_SCORE  # type: ignore[index]
    return vocabulary


def _byte_fallback(fast: dict[str, Any], size: int) -> Vocabulary:
    """SentencePiece-style BPE without tokenizer.model: the rank of a token's merge is its score.

    llama.cpp joins the neighbours whose result has the highest score, tokenizer.json the pair with the
    lowest rank: with score = −rank both join in the same order.
    """
    vocabulary = _byte_level(fast, size)
    rank: dict[str, int] = {}
    for position, merge in enumerate(fast["model"].get("merges", [])):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, position)
    scores = [-float(rank.get(token, len(rank))) for token in vocabulary.tokens]
    for i, token in enumerate(vocabulary.tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            vocabulary.types[i] = BYTE
        if token == fast["model"].get("unk_token"):
            vocabulary.types[i] = UNKNOWN
        if vocabulary.types[i] in (UNUSED, USER_DEFINED):
            scores[i] = PAD_SCORE
    vocabulary.scores = scores
    return vocabulary


def _sentencepiece_keys(out: gv.Metadata, vocabulary: Vocabulary, settings: dict[str, Any]) -> None:
    out["tokenizer.ggml.model"] = gv.string("llama")
    out["tokenizer.ggml.pre"] = gv.string("default")
    out["tokenizer.ggml.tokens"] = gv.array(gv.STRING, vocabulary.tokens)
    out["tokenizer.ggml.scores"] = gv.array(gv.F32, vocabulary.scores)
    out["tokenizer.ggml.token_type"] = gv.array(gv.I32, vocabulary.types)
    if isinstance(settings.get("add_prefix_space"), bool):
        out["tokenizer.ggml.add_space_prefix"] = gv.boolean(settings["add_prefix_space"])


def _special_keys(
    out: gv.Metadata, vocabulary: Vocabulary, fast: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]
) -> None:
    ids = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens)))}
    for key, name in SPECIALS.items():
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        number = ids.get(content) if content is not None else None
        if number is None:
            number = config.get(f"{name}_id")
            number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(vocabulary.tokens):
            out[f"tokenizer.ggml.{key}_token_id"] = gv.u32(number)
    starts, ends = _template_ends(fast.get("post_processor"))
    for key, found in (("add_bos_token", starts), ("add_eos_token", ends)):
        value = settings.get(key) if isinstance(settings.get(key), bool) else found
        if value is None:  # llama.cpp's own default depends on the kind; say it
            value = key == "add_bos_token" and vocabulary.scores is not None
        token = "bos" if key == "add_bos_token" else "eos"
        out[f"tokenizer.ggml.{key}"] = gv.boolean(value and f"tokenizer.ggml.{token}_token_id" in out)


def _template_ends(processor: dict[str, Any] | None) -> tuple[bool | None, bool | None]:
    """Whether a post-processor puts a special token before and after a single text."""
    if not processor:
        return None, None
    if processor.get("type") == "Sequence":
        found = [_template_ends(inner) for inner in processor.get("processors", ())]
        return next((f for f in found if f != (None, None)), (None, None))
    if processor.get("type") != "TemplateProcessing":
        return None, None
    single = processor.get("single") or [{}]
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default chat template: chat_template.jinja first, then tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{path} is not UTF-8 text", hint="download the file again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # named templates
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
