"""Does GRPO on a 4-bit base learn: sorting digits, held-out accuracy before and after, three seeds and a control.

    make bench-rl                              # everything, under 20 minutes; writes rl.json
    python benchmarks/rl.py --seeds 0 --steps 20 --dev      # a look; nothing is written

The base is a small Llama, trained here once from a fixed seed on lines such as ``4 1 3 2 0 > 0 1 2 3 4``, of which a
part is wrong: it knows the task and is unreliable. It lies in ``~/.cache/quantkit/trained/sorter-HASH``, the hash of all
that follows. It is quantized to Q4_0. Priming teaches another way of asking with a few dozen rows; GRPO follows with the
primed adapter. The control gets the same rewards, shuffled among the completions of a step. Prompts that accuracy is
measured on are those whose SHA-256 ends in 0: nothing trains on them. Accuracy is that of one completion drawn at
temperature 1 for each of 1,024 prompts, with its binomial standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import write_results

from quantkit.checkpoint import open_checkpoint
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as quantize
from quantkit.rl import train
from quantkit.rl.base import open_base
from quantkit.rl.options import GrpoOptions, LoraOptions, SftOptions
from quantkit.rl.plugin_peft import with_adapter
from quantkit.rl.rollouts import Sampling, TorchEngine

TOKENIZER = Path(__file__).parent.parent / "examples" / "models" / "qk-dense-6m"
CACHE = Path.home() / ".cache" / "quantkit" / "trained"
DIGITS, PRIMER, HELD = 5, 48, 1024
FORMAT = "Q4_0"
PRIMING = SftOptions(epochs=20, batch=24, together=24, learning_rate=5e-3, save_every=10_000)


@dataclass(frozen=True)
class Recipe:
    """The base. wrong: share of its lines whose answer has two digits exchanged."""

    hidden: int = 128
    layers: int = 3
    steps: int = 1500
    batch: int = 64
    rate: float = 2e-3
    wrong: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """GRPO's settings. steps: of the optimizer; prompts and completions of each are 64 × 8."""

    steps: int = 40
    prompts: int = 64
    generations: int = 8
    rate: float = 1e-3
    rank: int = 8


def question(digits: list[int]) -> str:
    return f"Sort {' '.join(map(str, digits))}:"


def held_out(digits: list[int]) -> bool:
    """Whether nothing may train on these digits."""
    return hashlib.sha256(question(digits).encode()).hexdigest().endswith("0")


def draws(seed: int, held: bool, count: int) -> list[list[int]]:
    """Different lists of digits, held out or not."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        digits = [rng.randrange(10) for _ in range(DIGITS)]
        if held_out(digits) == held:
            found[tuple(digits)] = digits
    return list(found.values())


def answer(digits: list[int]) -> str:
    return " " + " ".join(map(str, sorted(digits)))


def exact(prompts: list[str], completions: list[str], digits: list[list[int]], **_: Any) -> list[float]:
    """1 for the sorted digits; up to 0.3 for digits in their place."""
    out = []
    for text, given in zip(completions, digits, strict=True):
        said, true = text.split(), list(map(str, sorted(given)))
        out.append(1.0 if said == true else 0.3 * sum(a == b for a, b in zip(said, true, strict=False)) / DIGITS)
    return out


class Shuffled:
    """The same rewards, dealt out among the completions of a step."""

    __name__ = "exact"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def __call__(self, **columns: Any) -> list[float]:
        values = exact(**columns)
        self._rng.shuffle(values)
        return values


# -- the base ---------------------------------------------------------------------------------------


def base_folder(recipe: Recipe) -> Path:
    """The folder of the base, trained if it is not there yet."""
    key = hashlib.sha256(
        json.dumps([asdict(recipe), Path(__file__).read_text().split("# -- the study")[0]]).encode()
    ).hexdigest()[:12]
    folder = CACHE / f"sorter-{key}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            train_base(recipe, Path(temporary, "model"))
            Path(temporary, "model").rename(folder)
    return folder


def train_base(recipe: Recipe, folder: Path) -> None:
    """Next tokens on lines with some wrong answers."""
    import transformers

    torch.manual_seed(recipe.seed)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=recipe.hidden, intermediate_size=3 * recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        folder.mkdir(exist_ok=True)
        shutil.copy(TOKENIZER / file, folder / file)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.steps)
    for step in range(recipe.steps):
        lines = [line(rng, recipe.wrong) for _ in range(recipe.batch)]
        ids = [[0, *tokenizer(text, add_special_tokens=False).input_ids, 1] for text in lines]
        width = max(map(len, ids))
        given = torch.tensor([row + [2] * (width - len(row)) for row in ids])
        loss = model(input_ids=given, labels=given.masked_fill(given == 2, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"base: step {step}, {loss.item():.3f} nats/token", flush=True)
    model.bfloat16().save_pretrained(folder)


def line(rng: random.Random, wrong: float) -> str:
    """A line of the base's text, not held out."""
    while True:
        digits = [rng.randrange(10) for _ in range(DIGITS)]
        if not held_out(digits):
            break
    right = sorted(digits)
    if rng.random() < wrong:
        i, j = rng.sample(range(DIGITS), 2)
        right[i], right[j] = right[j], right[i]
    return f"{' '.join(map(str, digits))} > {' '.join(map(str, right))}"


# -- the study --------------------------------------------------------------------------------------


def accuracy(base: Path, adapter: Path | None, seed: int = 7) -> tuple[float, float]:
    """Share of held-out prompts answered right, and its standard error."""
    opened = open_base(base)
    model = opened.model if adapter is None else with_adapter(opened.model, str(adapter))
    digits = draws(99, True, HELD)
    prompts = [opened.tokenizer(question(row)).input_ids for row in digits]
    sampling = Sampling(2 * DIGITS + 3, 1.0, [opened.tokenizer.eos_token_id], opened.tokenizer.pad_token_id, seed)
    found = TorchEngine(batch=256).complete(model.eval(), prompts, sampling)
    texts = opened.tokenizer.batch_decode(found.ids, skip_special_tokens=True)
    right = [text.split() == answer(row).split() for text, row in zip(texts, digits, strict=True)]
    share = sum(right) / len(right)
    return share, (share * (1 - share) / len(right)) ** 0.5


def learn(base: Path, seed: int, study: Study, folder: Path, control: bool) -> dict[str, Any]:
    """Prime, then GRPO, with accuracy after each."""
    started = time.perf_counter()
    lora = LoraOptions(rank=study.rank)
    primer = [{"prompt": question(row), "completion": answer(row)} for row in draws(seed, False, PRIMER)]
    primed, taught = folder / f"primed-{seed}", folder / f"taught-{seed}-{control}"
    if not primed.exists():
        train.sft(
            base,
            primer,
            primed,
            replace(PRIMING, seed=seed, lora=lora),
        )
    rows = [{"prompt": question(row), "digits": row} for row in draws(1000 + seed, False, 2048)]
    together = study.prompts * study.generations
    options = GrpoOptions(
        steps=study.steps, together=together, batch=together // 2, generations=study.generations, completion=2 * DIGITS + 3,
        learning_rate=study.rate, seed=seed, lora=lora, save_every=10_000, max_length=64,
    )  # fmt: skip
    outcome = train.grpo(base, rows, [Shuffled(seed) if control else exact], taught, options, adapter=primed)
    before, after = accuracy(base, primed), accuracy(base, taught)
    curve = [round(row["rewards/exact/mean"], 4) for row in outcome.log if "rewards/exact/mean" in row]
    found = {
        "base": base.name, "seed": seed, "control": control, "primed": before[0], "after": after[0], "error": after[1],
        "gain_points": round(100 * (after[0] - before[0]), 2), "seconds": round(time.perf_counter() - started, 1), "curve": curve,
    }  # fmt: skip
    print({key: value for key, value in found.items() if key != "curve"}, flush=True)
    return found


def main() -> None:
    """Rows for each seed, the control, and the full-precision twin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Study.steps)
    parser.add_argument("--no-twin", action="store_true", help="without the full-precision base")
    parser.add_argument("--dev", action="store_true", help="write nothing")
    given = parser.parse_args()
    study, started = replace(Study(), steps=given.steps), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain = base_folder(Recipe())
        packed = folder / f"sorter-{FORMAT}.gguf"
        checkpoint = open_checkpoint(plain)
        quantize(checkpoint, uniform_plan(checkpoint, FORMAT, None), packed)
        digest = open_base(packed).digest
        rows: list[dict[str, Any]] = []
        for base in [packed] if given.no_twin else [packed, plain]:
            rows += [learn(base, seed, study, folder / f"runs-{base.name}", False) for seed in given.seeds]
        rows.append(learn(packed, given.seeds[0], study, folder / f"runs-{packed.name}", True))
        unprimed = accuracy(packed, None)
        assert open_base(packed).digest == digest
    said = {"unprimed": unprimed[0], "digest": digest, "study": asdict(study), "seconds": round(time.perf_counter() - started, 1)}
    print(said)
    if not given.dev:
        print(f"written: {write_results('rl', 'make bench-rl', rows, **said)}")


if __name__ == "__main__":
    main()
