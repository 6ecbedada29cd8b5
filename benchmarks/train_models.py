"""Models that nobody tuned on: a tiny Llama and a tiny Qwen3-MoE, trained here from scratch in a few minutes.

    python benchmarks/train_models.py                    # both; printed are their folders and losses
    python benchmarks/train_models.py tiny-llama

They lie in ``~/.cache/quantkit/trained/NAME-HASH``, the hash of all that follows, and are trained once. The text
is that of ``TEXTS``: nothing that is judged. Muon for the matrices of the layers, AdamW for the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import SHARED, write_results

TEXTS = {"calibration/wiki.utf8": None, "tinystories/stories.txt": 1_400_000}  # bytes from the beginning, None: all
HELD_APART = {"stories": ("tinystories/stories.txt", 150_000), "c4": ("calibration/c4.utf8", 150_000)}  # bytes from the end
TOKENIZER = SHARED / "models" / "qk-dense-6m"
WINDOW, BATCH, EVALUATED = 256, 16, 64  # tokens, windows a step, windows of each held-apart text
COMMON = {
    "vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "use_cache": False,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One model: its architecture and how it is trained. steps: updates of BATCH windows."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 700
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    expert_rate: float = 2e-3
    warmup: float = 0.05
    seed: int = 1


RECIPES = {
    "tiny-llama": Recipe("llama", {"intermediate_size": 768, "num_hidden_layers": 5, "rms_norm_eps": 1e-5}),
    "tiny-qwen3-moe": Recipe("qwen3_moe", {
        "intermediate_size": 768, "num_hidden_layers": 4, "rms_norm_eps": 1e-6, "moe_intermediate_size": 256, "num_experts": 8,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "router_aux_loss_coef": 0.02,
    }),
}  # fmt: skip


def folder_of(name: str) -> Path:
    """Where a trained model lies: the name and a hash of everything that shapes it."""
    settings = repr((asdict(RECIPES[name]), COMMON, TEXTS, WINDOW, BATCH))
    root = Path(os.environ.get("QUANTKIT_CACHE") or Path.home() / ".cache" / "quantkit")
    return root / "trained" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def trained(name: str) -> Path:
    """The Hugging Face folder of a model of ``RECIPES``; trains it if it is not there."""
    folder = folder_of(name)
    if not folder.exists():
        _train(name, folder)
    return folder


def token_ids(text: str) -> np.ndarray:
    """Ids of a text by the shipped tokenizer, int64 (tokens,)."""
    from tokenizers import Tokenizer

    return np.array(Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def training_ids() -> np.ndarray:
    """Ids of the training text, int64 (tokens,)."""
    texts = [(SHARED / "data" / name).read_bytes()[:stop].decode("utf-8", "ignore") for name, stop in TEXTS.items()]
    return np.concatenate([token_ids(text) for text in texts])


def held_apart_ids() -> dict[str, np.ndarray]:
    """Ids of the texts that judge the training, by name."""
    return {
        kind: token_ids((SHARED / "data" / name).read_bytes()[-size:].decode("utf-8", "ignore"))
        for kind, (name, size) in HELD_APART.items()
    }


def new_model(recipe: Recipe) -> Any:
    """transformers' model with fresh weights, float32."""
    import torch
    import transformers

    from quantkit.modeling.skeleton import quiet

    quiet()
    torch.manual_seed(recipe.seed)
    config = transformers.AutoConfig.for_model(recipe.kind, **{**COMMON, **recipe.config})
    config._attn_implementation = "sdpa"
    if "num_experts" in recipe.config:
        config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def optimizers(model: Any, recipe: Recipe) -> list[Any]:
    """Muon for the matrices of the layers; AdamW for embedding, head, norms, routers and stacked experts."""
    import torch

    layers = dict(model.model.layers.named_parameters())
    muon = {name: p for name, p in layers.items() if p.ndim == 2 and not name.endswith("mlp.gate.weight")}
    experts = {name: p for name, p in layers.items() if p.ndim == 3}
    ours = {id(p) for p in (*muon.values(), *experts.values())}
    rest = [p for p in model.parameters() if id(p) not in ours]
    groups = [{"params": rest, "lr": recipe.adam_rate}, {"params": list(experts.values()), "lr": recipe.expert_rate}]
    return [
        torch.optim.Muon(list(muon.values()), lr=recipe.muon_rate, weight_decay=0.01),
        torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _train(name: str, folder: Path) -> None:
    """Train, report, and save as bfloat16; the folder appears when it is complete."""
    import torch

    recipe = RECIPES[name]
    ids, started = training_ids(), time.perf_counter()
    model = new_model(recipe)
    steppers = optimizers(model, recipe)
    rates = [[group["lr"] for group in s.param_groups] for s in steppers]
    rng = np.random.default_rng(recipe.seed)
    order = np.concatenate([_epoch(len(ids), rng) for _ in range(1 + recipe.steps * BATCH * WINDOW // len(ids))])
    for step in range(recipe.steps):
        factor = min(1.0, (step + 1) / (recipe.warmup * recipe.steps), 1.05 * (1 - step / recipe.steps))
        for stepper, base in zip(steppers, rates, strict=True):
            for group, rate in zip(stepper.param_groups, base, strict=True):
                group["lr"] = rate * factor
        rows = np.stack([ids[i : i + WINDOW] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = _update(model, torch.from_numpy(rows), steppers)
        if step % 25 == 0 or step == recipe.steps - 1:
            print(f"{name} step {step}/{recipe.steps} loss {loss:.3f} {time.perf_counter() - started:.0f} s", flush=True)
    facts = {"seconds": round(time.perf_counter() - started, 1), "tokens": recipe.steps * BATCH * WINDOW}
    _save(model.to(torch.bfloat16), folder, {"recipe": asdict(recipe), "threads": torch.get_num_threads(), **facts})


def _epoch(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Beginnings of windows that cover the text once, in random order, from a random offset."""
    return rng.permutation(np.arange(int(rng.integers(WINDOW)), tokens - WINDOW, WINDOW))


def _update(model: Any, rows: Any, steppers: list[Any]) -> float:
    """One step on windows of ids (BATCH, WINDOW); returns the loss, with that for balanced experts."""
    import torch

    options = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(rows, labels=rows, **options).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return float(loss.detach())


def _save(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model, the tokenizer and how it came about, then move the folder to its name."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / file, part / file)
    (part / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    part.rename(folder)


def judge(folder: Path) -> dict[str, Any]:
    """Losses in nats per token on the held-apart texts as quantkit reads the model, beside a unigram model's; expert use."""
    import torch

    from quantkit.checkpoint import open_checkpoint
    from quantkit.modeling.skeleton import materialized_model

    checkpoint = open_checkpoint(folder)
    model = materialized_model(checkpoint)
    counts = np.bincount(training_ids(), minlength=COMMON["vocab_size"]) + 1
    unigram = -np.log(counts / counts.sum())
    out: dict[str, Any] = {"weights": checkpoint.n_weights}
    used = _count_experts(model)
    for kind, ids in held_apart_ids().items():
        rows = torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[:EVALUATED])
        with torch.inference_mode():
            loss = float(np.mean([float(model(row[None], labels=row[None]).loss) for row in rows]))
        plain = float(unigram[rows.numpy()].mean())
        out[kind] = {"loss": round(loss, 3), "perplexity": round(math.exp(loss), 2), "unigram_loss": round(plain, 3)}
    if used:
        out["least_used_expert"] = round(float(min((n / n.sum()).min() for n in used.values())), 4)
        out["most_used_expert"] = round(float(max((n / n.sum()).max() for n in used.values())), 4)
    return out


def _count_experts(model: Any) -> dict[int, np.ndarray]:
    """Tokens that each expert sees from now on, by layer: filled while the model runs; empty if it has no experts."""
    top = getattr(model.config, "num_experts_per_tok", 0)
    used: dict[int, np.ndarray] = {}
    for number, layer in enumerate(model.model.layers if top else ()):
        used[number] = np.zeros(model.config.num_experts)

        def count(module: Any, inputs: Any, output: Any, counts: np.ndarray = used[number]) -> None:
            logits = inputs[0] @ module.weight.T
            counts += np.bincount(logits.topk(top, -1).indices.reshape(-1).numpy(), minlength=len(counts))

        layer.mlp.gate.register_forward_hook(count)
    return used


def main() -> None:
    """Train what is missing, print folders and losses, write benchmarks/results/train_models.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(RECIPES)}")
    if not SHARED.exists():
        raise SystemExit("needs ../shared: the texts to train on")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    rows = []
    for name in options.names or RECIPES:
        folder = trained(name)
        facts = json.loads((folder / "training.json").read_text())
        rows.append({"model": name, "seconds": facts["seconds"], "threads": facts["threads"], **judge(folder)})
        print(folder, json.dumps(rows[-1]))
    if not options.names:
        write_results("train_models", "python benchmarks/train_models.py", rows)


if __name__ == "__main__":
    main()
