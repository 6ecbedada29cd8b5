"""Text to token ids, with the tokenizer of a Hugging Face folder or of a GGUF file."""

from __future__ import annotations

import copy
from typing import Any

from quantkit.checkpoint import Checkpoint, HfCheckpoint
from quantkit.checkpoint import gguf_values as gv
from quantkit.errors import CheckpointError


class TextEncoder:
    """Encodes text without special tokens; ``bos`` is the id to put in front, or None; ``ends`` are those that end a text."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from tokenizers import Tokenizer

        metadata = gv.plain(checkpoint.metadata())
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in ("llama-bpe", "tekken"))
        self.bos = metadata.get("tokenizer.ggml.bos_token_id") if add_bos else None
        ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        self.ends = [int(token) for token in ends if token is not None]
        self.chat_template: str | None = metadata.get("tokenizer.chat_template")
        tokens = metadata["tokenizer.ggml.tokens"]
        self._special = {
            short: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
            for name, short in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk"))
            if f"tokenizer.ggml.{name}_token_id" in metadata
        }
        if isinstance(checkpoint.opened, HfCheckpoint) and (checkpoint.path / "tokenizer.json").exists():
            self._tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        elif metadata.get("tokenizer.ggml.model") == "gpt2":
            self._tokenizer = _byte_level(metadata)
        elif metadata.get("tokenizer.ggml.model") == "llama":
            self._tokenizer = _sentencepiece(metadata)
        else:
            raise CheckpointError(f"{checkpoint.path.name} has no tokenizer quantkit can run", hint="use the Hugging Face folder")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def windows(self, text: str, window: int) -> list[list[int]]:
        """Whole windows of ``window`` ids without overlap, each with the beginning-of-text id where the model wants one."""
        lead = [] if self.bos is None else [self.bos]
        body = window - len(lead)
        ids = self.encode(text)
        return [lead + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence, with the beginning-of-text id where the model wants one."""
        ids = self.encode(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def render_chat(self, messages: list[dict[str, str]], answer: bool = False) -> str:
        """Messages in the model's chat template (sandboxed), or joined by lines if it has none or it fails.

        answer: with what precedes the model's own next message.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            names = {f"{name}_token": token for name, token in self._special.items()}
            try:
                return environment.from_string(self.chat_template).render(
                    messages=messages, add_generation_prompt=answer, **names
                )
            except TemplateError:
                pass
        return "\n".join(message["content"] for message in messages)


def transformers_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of a model, with its special tokens and chat template; padding is the end where there is none.

    A text gets the beginning-of-text token where the model wants one; a rendered chat gets what its template says. Raises
    CheckpointError for a kind that quantkit cannot run.
    """
    import transformers
    from tokenizers.processors import TemplateProcessing

    text = TextEncoder(checkpoint)
    names = {f"{name}_token": token for name, token in text._special.items()}
    names.setdefault("pad_token", names.get("eos_token", ""))
    if not names.get("eos_token"):
        raise CheckpointError(f"{checkpoint.path.name} names no token that ends a text", hint="use a model with an eos token")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(text._tokenizer), **names)
    tokenizer.backend_tokenizer.post_processor = None
    if text.bos is not None:
        token = text._special["bos"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, text.bos)])
    tokenizer.chat_template = text.chat_template
    return tokenizer


def _byte_level(metadata: dict[str, Any]) -> Any:
    """A ``tokenizers`` BPE from GGUF metadata; the pre-tokenizer comes from our table of definitions."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from quantkit.checkpoint.pretokenizer import definition_of

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    name = metadata.get("tokenizer.ggml.pre", "default")
    row = definition_of(name)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=row["ignore_merges"]))
    steps: list[Any] = []
    for step in row["steps"]:
        if step[0] == "split":
            steps.append(pre_tokenizers.Split(Regex(step[1]), "isolated"))
        elif step[0] == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=step[1]))
        elif step[0] == "bytelevel":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=step[2], use_regex=step[1]))
        else:
            raise CheckpointError(f"pre-tokenizer {name!r} needs the step {step[0]}", hint="use the Hugging Face folder")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(t, special=kind == 3, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind in (3, 4)
    ]
    tokenizer.add_tokens(special)
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> Any:
    """A ``tokenizers`` BPE with byte fallback whose merges follow the SentencePiece scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    ranked = []
    for token, i in vocab.items():
        if types[i] != 1:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                ranked.append((-scores[i], i, (token[:cut], token[cut:])))
    merges = [pair for _, _, pair in sorted(ranked)]
    unk = next((t for t, kind in zip(tokens, types, strict=True) if kind == 2), None)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    )
    return tokenizer
