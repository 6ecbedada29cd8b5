"""Healing: what learned scales and an adapter give back of what llama-quantize's mixes took.

    make bench-heal          # or: python benchmarks/heal.py [--mixes Q2_K …] [--steps 30]

Training sees stories and C4; the judged texts (held-out TinyStories, WikiText-2 test) are read after every file is written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from allocation import JUDGED, calibration_files, make_stock
from common import SHARED, write_results

from quantkit.checkpoint import open_checkpoint
from quantkit.evaluation.compare import compare
from quantkit.rl.base import open_base
from quantkit.rl.export import export_adapter
from quantkit.rl.heal import heal
from quantkit.rl.options import HealOptions, LoraOptions

MODEL = "qk-dense-6m"
MIXES = ("Q3_K_M", "Q2_K")
TEXTS = ("tinystories/stories.txt", "calibration/c4.utf8")
CHARACTERS = 600_000  # of each
TOKENS = 16_384  # judged, of each text
RATES = {"scales": 5e-3, "adapter": 3e-4}


def training_texts(folder: Path) -> list[Path]:
    """The beginnings of the texts to train on."""
    out = []
    for name in TEXTS:
        out.append(folder / name.replace("/", "-"))
        out[-1].write_text((SHARED / "data" / name).read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return out


def healed(model: Path, base: Path, folder: Path, steps: int) -> dict[str, tuple[str, dict[str, float]]]:
    """What to compare, as `compare` takes it, and what each run said, by what learned."""
    out = {}
    for learn, rate in RATES.items():
        options = HealOptions(steps=steps, learn=learn, learning_rate=rate, lora=LoraOptions(rank=16))
        run = folder / f"{base.stem}-{learn}"
        found = heal(base, model, training_texts(folder), run, options)
        path = str(found.file)
        if learn == "adapter":
            export_adapter(run, open_base(base), run / "adapter.gguf")
            path = f"{base}+{run / 'adapter.gguf'}"
        said = {
            "apart_before": found.base,
            "apart_begun": found.begun,
            "apart_after": found.healed,
            "seconds": found.outcome.seconds,
        }
        out[learn] = (path, said)
        print(f"{base.name} {learn}: {found.base:.4f} → {found.healed:.4f} nats/token apart, {said['seconds']:.0f} s", flush=True)
    return out


def main() -> None:
    """Rows by mix, text and what learned; writes benchmarks/results/heal.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    model = SHARED / "models" / MODEL
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calibration_files(folder)
        stock = make_stock(open_checkpoint(model), folder, tuple(given.mixes))
        for mix in given.mixes:
            made = healed(model, stock[mix], folder, given.steps)
            for text, file in JUDGED.items():
                paths = [Path(stock[mix]), *(Path(path) for path, _ in made.values())]
                found = compare(model, paths, [SHARED / "data" / file], limit=TOKENS).candidates
                for what, one in zip(("nothing", *made), found, strict=True):
                    row = {"model": MODEL, "mix": mix, "text": text, "learned": what, "kld": one.divergence.mean_kld,
                           "kld_error": one.divergence.mean_kld_error, "ratio": one.divergence.mean_kld / found[0].divergence.mean_kld,
                           "bytes": one.file_bytes, "steps": given.steps, **(made[what][1] if what in made else {})}  # fmt: skip
                    rows.append(row)
                    print(
                        f"{mix} {text} {what}: {row['kld']:.4f} nats/token ({row['ratio']:.2f} ×), {row['bytes']:,} B", flush=True
                    )
    print(f"written: {write_results('heal', 'make bench-heal', rows)}")


if __name__ == "__main__":
    main()
