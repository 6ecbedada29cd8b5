"""Outlier twins: the same function with channels 8–128 times apart, quantized by llama.cpp and by quantkit.

    python benchmarks/twins.py [--dev] [--models qk-dense-6m …]

Large models have outlier channels and small ones do not. A twin of a small model has them: exact powers of two, moved
through norms, from up to down and from v to o. All sides calibrate on the same text; files of a row have at most the
same bytes. The judged texts are read here only, after every file is written; --dev judges on other text and records
nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from allocation import JUDGED, JUDGED_TOKENS, MIXES, MODELS, calibration_files, make_dynamic, make_stock
from common import SHARED, TOOLS, write_results

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.texts import load_calibration
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.transformed import TransformedCheckpoint
from quantkit.evaluation.compare import compare
from quantkit.modeling.skeleton import materialized_model
from quantkit.progress import Progress
from quantkit.quantizer.fold import find_fold
from quantkit.quantizer.fold_groups import Solution, groups_of, transform_of

SEED, SHARE = 1, 0.05  # of the channels of each group become outliers
EXPONENTS = (3, 8)  # their size: 2^3 … 2^7
LIMIT = 1.5  # of the KL divergence of the plain model
KINDS = ("stock plain", "stock twin", "quantkit plain", "quantkit twin", "quantkit twin, folded")
DEV = {"TinyStories, end of the training text": "tinystories/stories.txt", "C4, end": "calibration/c4.utf8"}
DEV_CHARACTERS = 150_000
TOKENS = 200_000  # of calibration text


def outliers(checkpoint: Checkpoint, seed: int) -> TransformedCheckpoint:
    """A few channels of every group grow where they are written, so that activations have outliers, and shrink where read."""
    rng = np.random.default_rng(seed)
    solutions = []
    for group in groups_of(checkpoint):
        if group.readers and not group.name.endswith("attn_qk"):
            chosen = rng.random(group.channels) < SHARE
            exponents = np.where(chosen, -rng.integers(*EXPONENTS, group.channels), 0)
            solutions.append(Solution(group, exponents.astype(np.int32)))
    return TransformedCheckpoint(checkpoint, transform_of(checkpoint, solutions))


def make_twin(model: Path, folder: Path, seed: int = SEED) -> Path:
    """Save the twin as a Hugging Face folder of the model's name in ``folder``, with its config and tokenizer."""
    import torch

    checkpoint = open_checkpoint(model)
    ids = torch.arange(3, 67)[None]
    twin = materialized_model(outliers(checkpoint, seed))
    target = folder / model.name
    brain = all(info.dtype == "BF16" for info in checkpoint.tensors.values())
    with torch.inference_mode():
        before = materialized_model(checkpoint)(ids).logits
        (twin.to(torch.bfloat16) if brain else twin).save_pretrained(target)  # powers of two: nothing is rounded
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, target / file.name)
        after = materialized_model(open_checkpoint(target))(ids).logits
    if not torch.equal(before, after):
        raise SystemExit(f"the twin of {model.name} computes something else: {(before - after).abs().max()}")
    return target


def make_files(model: Path, folder: Path) -> tuple[dict[str, dict[str, Path]], dict[str, float]]:
    """kind → mix → file, and how long finding the rescaling took."""
    twin = make_twin(model, folder / "twin")
    files = calibration_files(folder)
    out: dict[str, dict[str, Path]] = {}
    seconds: dict[str, float] = {}
    for kind, path in (("plain", model), ("twin", twin)):
        checkpoint, place = open_checkpoint(path), folder / f"{kind}-files"
        place.mkdir()
        shutil.copy(folder / "all.txt", place)
        out[f"stock {kind}"] = make_stock(checkpoint, place)
        out[f"quantkit {kind}"] = make_dynamic(checkpoint, place, files, out[f"stock {kind}"])[0]
    started = time.perf_counter()
    stats = calibrate(checkpoint, load_calibration(checkpoint, files, TOKENS), Progress()).stats
    seconds["calibrate"] = time.perf_counter() - started
    started = time.perf_counter()
    folded = TransformedCheckpoint(checkpoint, find_fold(checkpoint, stats))
    seconds["find_fold"] = time.perf_counter() - started
    place = folder / "folded-files"
    place.mkdir()
    out["quantkit twin, folded"] = make_dynamic(folded, place, files, out["stock twin"])[0]
    return out, {name: round(value, 2) for name, value in seconds.items()}


def judge(model: Path, files: dict[str, dict[str, Path]], texts: dict[str, Path], runtimes: tuple[str, ...]) -> list[dict]:
    """A row for each text, runtime and mix; the plain model is the reference of all, because the twin is the same function."""
    rows = []
    for text, path in texts.items():
        for runtime in runtimes:
            candidates = [files[kind][mix] for mix in MIXES for kind in KINDS]
            report = compare(model, candidates, [path], runtime=runtime, limit=JUDGED_TOKENS)
            for i, mix in enumerate(MIXES):
                some = dict(zip(KINDS, report.candidates[len(KINDS) * i :], strict=False))
                kld = {kind: some[kind].divergence.mean_kld for kind in KINDS}
                ratio = kld["quantkit twin, folded"] / kld["quantkit plain"]
                rows.append({
                    "model": model.name, "text": text, "runtime": runtime, "mix": mix, "tokens": report.tokens, "kld": kld,
                    "kld_error": {kind: some[kind].divergence.mean_kld_error for kind in KINDS},
                    "bytes": {kind: some[kind].file_bytes for kind in KINDS}, "ratio": ratio, "limit": LIMIT, "reached": ratio <= LIMIT,
                })  # fmt: skip
                numbers = ", ".join(f"{kind} {value:.4f}" for kind, value in kld.items())
                print(f"{model.name:12} {text:21} {runtime:5} {mix:7} {numbers}; ratio {ratio:.2f} (limit {LIMIT})", flush=True)
    return rows


def texts_of(dev: bool, folder: Path) -> dict[str, Path]:
    """The judged texts, or the ends of two others."""
    if not dev:
        return {text: SHARED / "data" / name for text, name in JUDGED.items()}
    out = {}
    for text, name in DEV.items():
        out[text] = folder / f"dev-{name.replace('/', '-')}.txt"
        out[text].write_text((SHARED / "data" / name).read_text(encoding="utf-8")[-DEV_CHARACTERS:], encoding="utf-8")
    return out


def main() -> None:
    """All models; prints rows as they come and writes benchmarks/results/twins.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="judge on development text with torch only; nothing is written")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="folders in ../shared/models")
    given = parser.parse_args()
    if not SHARED.exists() or not TOOLS.exists():
        raise SystemExit("needs ../shared and the tools of `python tools/build_llama.py`")
    rows, seconds = [], {}
    for name in given.models:
        model = SHARED / "models" / name
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "twin").mkdir()
            files, seconds[name] = make_files(model, folder)
            rows += judge(model, files, texts_of(given.dev, folder), ("torch",) if given.dev else ("torch", "llama"))
    print(seconds)
    if given.dev:
        return
    twin = {"seed": SEED, "share": SHARE, "factors": [2**e for e in range(*EXPONENTS)]}
    print(f"written: {write_results('twins', 'python benchmarks/twins.py', rows, twin=twin, seconds=seconds)}")


if __name__ == "__main__":
    main()
