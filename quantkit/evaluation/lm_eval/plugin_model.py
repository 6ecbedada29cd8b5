"""The lm-eval model type ``quantkit``: any folder or GGUF, through torch or llama.cpp. Imported only inside functions.

Tokens, windows, truncation and generating are those of lm-eval's own class for transformers, from which this one
descends; scoring differs: a context that several continuations share is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from quantkit.checkpoint import Checkpoint, HfCheckpoint
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluation.candidates import open_candidate
from quantkit.evaluation.lm_eval.draws import Draw, Drawer, is_random, numbered
from quantkit.evaluation.lm_eval.engines import LLAMA_WINDOW, LlamaEngine, TorchEngine, generation_facts
from quantkit.evaluation.lm_eval.rows import Row, batches, row_of
from quantkit.evaluation.lm_eval.tasks import quietly
from quantkit.kernels.devices import default_dtype
from quantkit.modeling.products import fast_float32
from quantkit.modeling.skeleton import quiet
from quantkit.modeling.text import TextEncoder, transformers_tokenizer
from quantkit.progress import Progress

BATCH = 16  # sequences in a pass
WINDOW_KEY = "loglikelihood_window"  # lm-eval's cache keeps single windows under it


@register_model("quantkit")
class QuantkitLM(HFLM):
    """A model on disk for lm-eval.

    path: a Hugging Face folder, a folder or file that quantkit wrote, any GGUF, or FILE+ADAPTER. runtime: torch or llama.
    window: tokens of context (default: the model's, with llama.cpp at most 2048). dtype: torch's, or auto for that of the
    model's configuration; float32 by default on the CPU. packed: keep quantized weights packed in torch on the CPU too.
    batch_size: sequences in a pass. prefix_cache: read a shared context once. Further options (add_bos_token,
    prefix_token_id, chat_template_args …) as of the type ``hf``. truncated: how many requests lost tokens from the left.
    new_tokens: what a folder's generation_config.json says of the length of generated text, which for transformers, and so
    for ``hf``, goes before the task's. Raises QuantkitError for a model, runtime or device that cannot be used.
    """

    def __init__(
        self, path: str, runtime: str = "torch", device: str = "cpu", window: int | None = None, dtype: str | None = None,
        packed: bool | None = None, batch_size: int | str = BATCH, max_batch_size: int | None = None, prefix_cache: bool = True,
        progress: Progress | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if runtime not in ("torch", "llama"):
            raise QuantkitError(f"no runtime {runtime!r}", hint="use torch or llama")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # as the type hf does: lm-eval asks for cuda:0 where the user names nothing
        quiet()
        self.checkpoint, self.runtime = open_candidate(Path(path)), runtime
        self.encoder = TextEncoder(self.checkpoint)
        self.truncated, self._share, self._progress = 0, prefix_cache, progress or Progress()
        self.new_tokens: int | None = generation_facts(self.checkpoint).get("max_new_tokens")
        context = int(self.checkpoint.config.get("max_position_embeddings") or LLAMA_WINDOW)
        window = int(window or (min(context, LLAMA_WINDOW) if runtime == "llama" else context))
        self.engine = (
            LlamaEngine(self.checkpoint, window)
            if runtime == "llama"
            else TorchEngine(self.checkpoint, device, _dtype(self.checkpoint, dtype, device), packed)
        )
        with quietly():  # it warns of models that are not names
            super().__init__(
                self.engine.model, tokenizer=_tokenizer(self.checkpoint, options.get("add_bos_token")), max_length=window,
                batch_size=BATCH if str(batch_size).startswith("auto") else int(batch_size), **options,
            )  # fmt: skip

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm-eval's cache of requests."""
        return f"{self.checkpoint.path.name}-{self.checkpoint.stamp}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model into its results."""
        return {
            "model_num_parameters": self.checkpoint.n_weights, "model_identity": self.checkpoint.identity,
            "model_runtime": self.runtime, "model_window": self.max_length,
        }  # fmt: skip

    def close(self) -> None:
        """Free the model."""
        self.engine.close()
        self._model = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of the continuation of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, one text after the other, so that a killed run goes on with the next."""
        task, out = self._progress.task("texts", total=len(requests), unit="texts"), list[float]()
        for request in requests:
            out += super().loglikelihood_rolling([request], True)
            task.advance()
        task.done()
        return out

    def loglikelihood_windows(self, requests: list[Any]) -> list[list[tuple[float, int]]]:
        """(log-likelihood, tokens) of the second half of every window of a text, cut and scored as by llama-perplexity.

        A request's arguments: (text, {"window": tokens, "windows": at most so many or None}). The text is one stream;
        where the model wants a beginning-of-text token, this stands in the place of each window's first. Raises
        CalibrationError if there is no whole window, or if it exceeds the model's.
        """
        return [self._windows(*request.args) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context until a stop sequence. Of equal requests for random texts each gets one of its own, the
        same in every run: those that an earlier run kept are not drawn again.

        Raises CalibrationError if a text can fill the whole window, QuantkitError for a way of drawing that is not built.
        """
        known: Any = self.cache_hook.dbdict if self.cache_hook.dbdict is not None else {}
        asked, out, todo = numbered([request.args for request in requests]), dict[int, str](), list[int]()
        for place, (context, given) in enumerate(asked):
            self._require_room(context, given)
            key = hash_args("generate_until", (context, given)) if is_random(given) else None
            if key is not None and key in known:  # the others were looked up by lm-eval
                out[place] = known[key]
            else:
                todo.append(place)
        missing = [Instance("generate_until", {}, asked[place], 0) for place in todo]
        said = super().generate_until(missing, disable_tqdm or self._progress.bar is None) if missing else []
        out |= zip(todo, said, strict=True)
        return [out[place] for place in range(len(asked))]

    def _require_room(self, context: str, given: dict[str, Any]) -> None:
        """Raise CalibrationError unless the longest text leaves room for a context; count contexts that are cut."""
        count = normalize_gen_kwargs(given, self.max_gen_toks)["max_gen_toks"]
        if count >= self.max_length:
            raise CalibrationError(
                f"the task generates up to {count} tokens, the window has {self.max_length}",
                hint="raise --window, or leave the task out",
            )
        self.truncated += len(self.tok_encode(context)) > self.max_length - count

    def _windows(self, text: str, given: dict[str, Any]) -> list[tuple[float, int]]:
        window = int(given["window"])
        if window > self.max_length:
            raise CalibrationError(f"windows of {window} tokens exceed the model's {self.max_length}", hint="raise --window")
        lead = [] if self.encoder.bos is None else [self.encoder.bos]
        stream = lead + self.encoder.encode(text)
        starts = range(0, len(stream) - window + 1, window)[: given.get("windows")]
        if not starts:
            raise CalibrationError(f"the text has fewer than {window} tokens", hint="give a longer text")
        rows = [lead + stream[start + len(lead) : start + window] for start in starts]
        known: Any = self.cache_hook.dbdict if self.cache_hook.dbdict is not None else {}
        keys = [hash_args(WINDOW_KEY, [row]) for row in rows]
        found = {key: known[key] for key in keys if key in known}
        todo = [(key, row) for key, row in zip(keys, rows, strict=True) if key not in found]
        first = window // 2 + 1  # scored token
        task = self._progress.task("windows", total=len(todo), unit="windows")
        for key, row in todo:
            ((found[key], _),) = self._loglikelihood_tokens([(None, row[:first], row[first:])])
            self.cache_hook.add_partial(WINDOW_KEY, [row], found[key])
            task.advance()
        task.done()
        return [(found[key], window - first) for key in keys]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = [row_of(place, context, targets, self.max_length) for place, (_, context, targets) in enumerate(requests)]
        self.truncated += sum(len(row.context) < len(request[1]) for row, request in zip(rows, requests, strict=True))
        task = self._progress.task("answers", total=len(rows), unit="answers")
        for batch in batches(rows, self.batch_size, self.checkpoint.config["vocab_size"], self._share):
            for owners, values in zip(batch.rows, self.engine.logits(batch.groups), strict=True):
                for tied, logits in zip(owners, values, strict=True):
                    for row, answer in zip(tied, _scores(tied, logits), strict=True):
                        out[row.place] = answer
                        if requests[row.place][0] is not None:  # parts of a rolling text have no key
                            self.cache_hook.add_partial("loglikelihood", requests[row.place][0], answer)
            task.advance(sum(len(tied) for owners in batch.rows for tied in owners))
        task.done()
        return out

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        """Contexts, padded on the left, with what follows: int64 (rows, longest)."""
        mask = options.pop("attention_mask")
        given = [ids[real].tolist() for ids, real in zip(context, mask.bool(), strict=True)]
        draw = Draw.of(options) if is_random(options) else None
        if isinstance(self.engine, TorchEngine):
            self.engine.model.generation_config.max_new_tokens = self.new_tokens
            options |= {"do_sample": False, "temperature": 0.0}
            if draw is not None:
                options = {"do_sample": False, "temperature": 0.0, "logits_processor": [Drawer(draw, [*map(draw.stream, given)])]}
            with fast_float32():
                return super()._model_generate(context, max_length, stop, attention_mask=mask, **options)
        count, rows = self.new_tokens or max_length - context.shape[1], []
        for ids, real in zip(context, given, strict=True):
            new = self.engine.complete(
                real, min(count, self.max_length - len(real)), _pick(draw, real), lambda ids: self._stops(ids, stop)
            )
            rows.append(torch.cat([ids, torch.tensor(new, dtype=ids.dtype)]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _stops(self, ids: list[int], stop: list[str]) -> bool:
        text = self.tok_decode(ids, skip_special_tokens=False)
        return any(term in text for term in stop)


class WindowsTask(ConfigurableTask):
    """A task that asks for the windows of each document (``QuantkitLM.loglikelihood_windows``), which lm-eval's kinds cannot.

    Its metadata: window_tokens, and window_count where not all windows are wanted. Models of other types have no such
    request; lm-eval stops with an AttributeError then.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> Instance:
        """One request for a document: its text, and how to cut it."""
        given = {"window": self.config.metadata["window_tokens"], "windows": self.config.metadata.get("window_count")}
        return Instance("loglikelihood_windows", doc, (self.doc_to_target(doc), given), 0, options["metadata"])  # type: ignore[arg-type]


def _scores(tied: tuple[Row, ...], logits: Any) -> Iterator[tuple[float, bool]]:
    """Sum of log-probabilities of each row's targets, and whether each is the likeliest. logits: (targets, vocabulary)."""
    logp, best = logits.float().log_softmax(-1), logits.argmax(-1)
    for row in tied:
        targets = torch.tensor(row.targets, device=logits.device)
        yield float(logp.gather(-1, targets[:, None]).sum()), bool((best == targets).all())


def _pick(draw: Draw | None, prompt: list[int]) -> Callable[[torch.Tensor], int]:
    """The next id from logits (vocabulary,): the likeliest, or drawn as in torch."""
    if draw is None:
        return lambda logits: int(logits.argmax())
    drawer = Drawer(draw, [draw.stream(prompt)])
    return lambda logits: int(drawer(None, logits[None]).argmax())


def _tokenizer(checkpoint: Checkpoint, add_bos_token: bool | None) -> Any:
    """A folder's own tokenizer, as the type ``hf`` loads it, else one from the model's metadata."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if isinstance(checkpoint.opened, HfCheckpoint) and any(folder.glob("tokenizer*.json")):
        given = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **given)
    return transformers_tokenizer(checkpoint)


def _dtype(checkpoint: Checkpoint, name: str | None, device: str) -> torch.dtype:
    """Raises QuantkitError for a name that torch does not know."""
    if name is None:
        return default_dtype(device)
    if name == "auto":
        name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise QuantkitError(f"no type {name!r}", hint="use float32, bfloat16, float16 or auto")
    return found
