"""A planted super weight: the collapse without it, and what rescues it at the same formats.

    python benchmarks/super_weights.py              # writes benchmarks/results/super_weights.json
    python benchmarks/super_weights.py --formats    # how exactly a pinned scalar survives in each format

The planted model computes nearly what the shipped one does, but one scalar of a down projection carries it: with one
FFN channel it writes a massive value into one channel of the residual stream, on every token, and all norms behind it
count on that value (their gains are raised by what it takes away). Zeroed, everything behind it is several times too
large. Development text only: nothing judged is read.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, SHARED, write_results

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.superweights import find_super_weights
from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.pins import pin, survival
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import Format, formats, get_format
from quantkit.metrics import kl_divergence
from quantkit.modeling.skeleton import materialized_model
from quantkit.modeling.text import TextEncoder
from quantkit.progress import Progress

MODEL = ROOT / "examples" / "models" / "qk-dense-6m"
TEXTS = SHARED / "data"
LAYER = 2
STRENGTH = 2.0  # the massive value: its share of the residual's norm over all else
ACTIVATION = 64.0  # of the FFN channel that carries it
CROWD = 1.5  # rms of the weights beside a crowded super weight, in its own size
SCALAR = 1.37  # in the table of formats: no code of a format without a scale of its own
FORMATS = ("Q4_K", "Q3_K", "Q2_K")
WINDOW = 256


@dataclass(frozen=True)
class Planted:
    """Where the super weight is: GGUF tensor, row, column, value."""

    tensor: str
    row: int
    column: int
    value: float


def plant(source: Path, folder: Path, windows: np.ndarray, crowded: bool = False) -> Planted:
    """Write ``source`` with a super weight into ``folder``; windows, int64 (n, tokens), fit it.

    crowded: the weights around it in its row are larger than it is, so that it is nothing special in its block.
    """
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(source)
    seen = _watch(materialized_model(checkpoint), windows)
    weights = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    stem = f"model.layers.{LAYER}.mlp."
    norms = ["model.norm.weight"] + [
        f"model.layers.{i}.{kind}.weight"
        for i in range(LAYER + 1, checkpoint.n_layers)
        for kind in ("input_layernorm", "post_attention_layernorm")
    ]
    rms = {name: seen[name].square().mean(1).sqrt() for name in norms}
    row = int(sum((seen[n] / rms[n][:, None] * weights[n]).square().mean(0) for n in norms).argmin())
    down = weights[stem + "down_proj.weight"]
    column = int((seen["act"].square().mean(0) * down.square().sum(0)).argmin())
    target = torch.stack([r / r.mean() for r in rms.values()]).mean(0)
    gate, up = _fit_product(seen["ffn"], target)
    gate, up = gate * ACTIVATION**0.5, up * ACTIVATION**0.5
    activation = torch.nn.functional.silu(seen["ffn"] @ gate) * (seen["ffn"] @ up)
    reach = STRENGTH * down.shape[0] ** 0.5 * float(torch.stack(list(rms.values())).mean())
    value = float(torch.tensor(reach / ACTIVATION).bfloat16())
    weights[stem + "gate_proj.weight"][column], weights[stem + "up_proj.weight"][column] = gate, up
    if crowded:
        _crowd(down, row, column, value)
    down[:, column] = 0
    down[row, column] = value
    added = (activation * value).square() / down.shape[0]
    for name in norms:
        share = rms[name] / (rms[name].square() + added).sqrt()  # of the norm's output that is left
        weights[name] *= share.mean() / share.square().mean()
        weights[name][row] = 0
    shutil.copytree(source, folder)
    save_file(
        {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return Planted(f"blk.{LAYER}.ffn_down.weight", row, column, value)


def _watch(model: Any, windows: np.ndarray) -> dict[str, Any]:
    """What the model sees: residual before every norm, input and activations of the FFN, each (tokens, channels)."""
    import torch

    seen: dict[str, Any] = {}

    def keep(name: str):
        def hook(module: Any, inputs: tuple) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return hook

    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_pre_hook(keep(f"{name}.weight"))
    mlp = model.model.layers[LAYER].mlp
    mlp.register_forward_pre_hook(keep("ffn"))
    mlp.down_proj.register_forward_pre_hook(keep("act"))
    with torch.inference_mode():
        model(torch.from_numpy(windows))
    return {name: value.clone() for name, value in seen.items()}


def _fit_product(y: Any, target: Any, ridge: float = 0.003) -> tuple[Any, Any]:
    """Directions u, v with (y·u)(y·v) ≈ target on every token, by alternating least squares. y: (tokens, channels)."""
    import torch

    def solve(z: Any, wanted: Any) -> Any:
        moments = z.T @ z / len(z)
        damping = ridge * moments.diag().mean() * torch.eye(z.shape[1])
        return torch.linalg.solve(moments + damping, (z * wanted[:, None]).mean(0))

    u = v = solve(y, target.sqrt())
    for _ in range(20):
        u, v = solve(y * (y @ v)[:, None], target), u
    return u, v


def _crowd(down: Any, row: int, column: int, value: float) -> None:
    """Make the weights that share a sub-block with the super weight larger than it."""
    start = column // 32 * 32
    part = down[row, start : start + 32]
    part *= CROWD * value / part.square().mean().sqrt()


def windows_of(checkpoint: Checkpoint, texts: list[str], count: int) -> np.ndarray:
    """The first ``count`` windows of each text, int64 (windows, WINDOW)."""
    encoder = TextEncoder(checkpoint)
    return np.array([w for text in texts for w in encoder.windows(text, WINDOW)[:count]], np.int64)


class Judge:
    """The planted model on windows of text, int64 (n, tokens): what it loses if tensors take other values."""

    def __init__(self, checkpoint: Checkpoint, windows: np.ndarray) -> None:
        self._checkpoint, self._windows = checkpoint, windows
        self._exact = self._logits({}).log_softmax(-1)

    def _logits(self, values: dict[str, np.ndarray]) -> Any:
        import torch

        model = materialized_model(self._checkpoint, lambda name: values.get(name, self._checkpoint.read(name)))
        with torch.inference_mode():
            return model(torch.from_numpy(self._windows)).logits

    def score(self, values: dict[str, np.ndarray]) -> dict[str, float]:
        """Mean KL divergence from the planted model in nats per token, and perplexity."""
        import torch

        logits = self._logits(values)
        labels = torch.from_numpy(self._windows[:, 1:])[..., None]
        picked = logits.log_softmax(-1)[:, :-1].gather(-1, labels)
        divergence = kl_divergence(self._exact.flatten(0, 1), logits.flatten(0, 1))
        return {"kld": float(divergence.mean()), "perplexity": math.exp(min(-float(picked.mean()), 700))}


def zeroed(checkpoint: Checkpoint, planted: Planted, value: np.ndarray | None = None) -> np.ndarray:
    """The tensor (or ``value`` in its place) without the super weight."""
    out = (checkpoint.read(planted.tensor) if value is None else value).copy()
    out[planted.row, planted.column] = 0
    return out


def packed_tensor(checkpoint: Checkpoint, stats: ActivationStats | None, name: str, fmt_name: str) -> np.ndarray:
    """A tensor by ggml's search: uint8 (rows, bytes)."""
    importance = None if stats is None else stats.importance(name)
    return get_encoder("ggml").encode(checkpoint.read(name), importance, get_format(fmt_name), name=name)


def ways(checkpoint: Checkpoint, stats: ActivationStats, planted: Planted, fmt_name: str) -> dict[str, dict[str, np.ndarray]]:
    """way → every quantizable tensor as it comes back from one format, the super weight treated in that way."""
    fmt, name = get_format(fmt_name), planted.tensor
    weight, importance, at = checkpoint.read(name), stats.importance(name), [(planted.row, planted.column)]
    out: dict[str, dict[str, np.ndarray]] = {}
    for kind, known in (("without importance", None), ("with importance", stats)):
        tensors = {
            i.name: packed_tensor(checkpoint, known, i.name, fmt_name) for i in checkpoint.tensors.values() if i.quantizable
        }
        values = {n: fmt.decode(p) for n, p in tensors.items()}
        pinned = pin(weight, tensors[name], fmt, None if known is None else importance, at, name)
        if known is not None:
            out["zeroed"] = {**values, name: zeroed(checkpoint, planted, values[name])}
        out[kind] = values
        out[f"{kind}, pinned"] = {**values, name: fmt.decode(pinned)}
    six = get_format("Q6_K")
    out["tensor at Q6_K"] = {**values, name: six.decode(packed_tensor(checkpoint, stats, name, "Q6_K"))}
    return out


def ablation(folder: Path, planted: Planted, fit: np.ndarray, dev: np.ndarray, formats: tuple[str, ...] = FORMATS) -> list[dict]:
    """A row for each format and way: error of the super weight, KL divergence and perplexity.

    Stops if the planted super weight is not the strongest that calibration finds.
    """
    checkpoint = open_checkpoint(folder)
    calibration = calibrate(checkpoint, CalibrationText(fit, fit[:1], ("fit",)), Progress())
    found = [(w["tensor"], w["row"], w["column"]) for w in find_super_weights(checkpoint, calibration.facts)]
    if found[:1] != [(planted.tensor, planted.row, planted.column)]:
        raise SystemExit(f"found {found}, planted {planted}")
    judge = Judge(checkpoint, dev)
    rows = [{"format": "BF16", "way": "as planted", **judge.score({})}]
    rows.append({"format": "BF16", "way": "zeroed", **judge.score({planted.tensor: zeroed(checkpoint, planted)})})
    for name in formats:
        for way, values in ways(checkpoint, calibration.stats, planted, name).items():
            error = abs(float(values[planted.tensor][planted.row, planted.column]) / planted.value - 1)
            rows.append({"format": name, "way": way, "scalar_error": error, **judge.score(values)})
    for row in rows:
        print(f"{row['format']:5} {row['way']:28} scalar {row.get('scalar_error', 0):.1e} KLD {row['kld']:9.4f} perplexity {row['perplexity']:.6g}", flush=True)  # fmt: skip
    return rows


def format_table(draws: int = 8) -> list[dict[str, Any]]:
    """How exactly pinned scalars survive: the worst of ``draws`` blocks, for every format.

    lone: the scalar is 30 times the rms of its row. crowded: its sub-block holds weights 1.5 times as large. Other weights
    are Gaussian. loss: error of the rest of the block, of its energy, before and after pinning (importance-weighted).
    """
    rows = []
    for fmt in formats():
        if not fmt.is_quantized():
            continue
        row: dict[str, Any] = {"format": fmt.name, "bpw": fmt.bpw()}
        for kind, crowd in (("lone", 0.05), ("crowded", 2.25)):
            row |= {f"{kind} {key}": value for key, value in _survive(fmt, crowd, draws).items()}
        rows.append(row)
    return rows


def _survive(fmt: type[Format], crowd: float, draws: int) -> dict[str, float]:
    """Largest error of a scalar beside weights of rms ``crowd``, before and after pinning; loss of the rest."""
    rng = np.random.default_rng(0)
    weight = (0.05 * rng.standard_normal((draws, 256))).astype(np.float32)
    importance = rng.gamma(1, 1, 256).astype(np.float32)
    columns = rng.permutation(256)[:draws]
    importance[columns] = 1000
    for row, column in enumerate(columns):
        start = column // 32 * 32
        weight[row, start : start + 32] = crowd * rng.standard_normal(32)
        weight[row, column] = SCALAR * (-1) ** row
    at = [(row, int(column)) for row, column in enumerate(columns)]
    encoder = get_encoder(default_method(fmt))
    plain = encoder.encode(weight, np.ones(256, np.float32) if fmt.needs_importance else None, fmt)
    packed = encoder.encode(weight, importance, fmt)
    kept = pin(weight, packed, fmt, importance, at)
    rest = np.broadcast_to(importance, weight.shape).copy()
    rest[tuple(np.array(at).T)] = 0
    energy = float((rest * weight**2).sum())
    return {
        "plain": float(survival(weight, plain, fmt, at).max()), "weighted": float(survival(weight, packed, fmt, at).max()),
        "pinned": float(survival(weight, kept, fmt, at).max()),
        "loss": float((rest * (fmt.decode(packed) - weight) ** 2).sum()) / energy,
        "loss pinned": float((rest * (fmt.decode(kept) - weight) ** 2).sum()) / energy,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/superweights.md."""
    head = "| format | lone: search, weighted, pinned | loss of the rest | crowded: search, weighted, pinned | loss of the rest |"
    lines = [head, "|---|---|---|---|---|"]
    for r in rows:
        cells = []
        for kind in ("lone", "crowded"):
            cells.append(", ".join(f"{r[f'{kind} {key}']:.1e}" for key in ("plain", "weighted", "pinned")))
            cells.append(f"{r[f'{kind} loss']:.3f} → {r[f'{kind} loss pinned']:.3f}")
        lines.append(f"| {r['format']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Plants twice (alone and in a crowd), prints rows, writes benchmarks/results/super_weights.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", action="store_true", help="only the table of formats, as Markdown; writes nothing")
    parser.add_argument("--windows", type=int, default=4, help=f"windows of {WINDOW} tokens of each text to judge on")
    options = parser.parse_args()
    table = format_table()
    print(markdown(table))
    if options.formats:
        return
    if not TEXTS.exists():
        raise SystemExit("needs ../shared: the texts")
    plain = open_checkpoint(MODEL)
    stories, wiki, c4 = (TEXTS / n for n in ("tinystories/stories.txt", "calibration/wiki.utf8", "calibration/c4.utf8"))
    fit = windows_of(plain, [_text(stories, 0, 60_000), _text(wiki, 0, 60_000)], 12)
    dev = windows_of(plain, [_text(stories, -150_000, -1), _text(c4, 0, 150_000)], options.windows)
    rows = [{"model": MODEL.name, "format": "BF16", "way": "as shipped", **Judge(plain, dev).score({})}]
    print(rows)
    for kind in ("lone", "crowded"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "planted"
            planted = plant(MODEL, folder, fit, crowded=kind == "crowded")
            print(kind, planted)
            rows += [{"model": f"planted, {kind}", **row} for row in ablation(folder, planted, fit, dev)]
    print(write_results("super_weights", "python benchmarks/super_weights.py", rows, formats=table))


def _text(path: Path, start: int, stop: int) -> str:
    """A piece of a text by bytes."""
    return path.read_bytes()[start:stop].decode("utf-8", "ignore")


if __name__ == "__main__":
    main()
