"""Other quantizers' GGUF files of the same model, calibrated on the same windows, each made in an environment of its own.

    python benchmarks/peers.py MODEL [--mixes Q4_K_M,Q3_K_M,Q2_K] [--keep FOLDER] [--text TEXT]

Prints bytes and seconds for each peer and mix, or why there is no file; with ``--text`` the KL divergence too.
Versions, settings and what was reduced are in docs/peers.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from allocation import calibration_files
from common import build_llama

from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.huggingface import HfCheckpoint
from quantkit.errors import QuantkitError
from quantkit.evaluation.compare import compare
from quantkit.modeling.text import TextEncoder
from quantkit.planning.plan import Plan
from quantkit.planning.standard import standard_plan
from quantkit.quantizer.manifest import manifest_path
from quantkit.quantizer.pipeline import run

SCRIPTS = Path(__file__).parent / "peers"
PINNED = ("torch>=2.9,<2.14", "transformers==5.23.0")  # under this bound pip takes the small CPU wheel of torch
WINDOW = 512
SAMPLES = 128  # windows of calibration text: AutoRound's default number
ITERATIONS = 200  # tuning steps of a decoder layer: AutoRound's default
LIMIT_SECONDS = 3600
AUTO_ROUND_MIXES = {"Q2_K": "q2_k_s", "Q2_K_S": "q2_k_s"}  # it has no other mix of two bits for dense models
GPTQMODEL_TYPES = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Peer:
    """One quantizer: its package, what else its environment needs, and its tuning steps."""

    package: str
    version: str
    script: str
    iterations: int = 0
    vendored_gguf: bool = False

    @property
    def folder(self) -> Path:
        """Where its environment lies."""
        return build_llama.cache_dir().parent / "peers" / f"{self.package}-{self.version}"


PEERS = {
    "auto-round": Peer("auto-round", "0.16.1", "auto_round_export.py", iterations=ITERATIONS, vendored_gguf=True),
    "auto-round, untuned": Peer("auto-round", "0.16.1", "auto_round_export.py", vendored_gguf=True),
    "gptqmodel": Peer("gptqmodel", "7.6.0", "gptqmodel_export.py"),
}


class Refusal(Exception):
    """Why a peer has no file; one line."""


def call(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command quietly. Raises Refusal with the last line that it printed."""
    limits = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, errors="replace", timeout=LIMIT_SECONDS,
            env={**limits, **os.environ, **(env or {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Refusal(f"not done after {LIMIT_SECONDS} seconds") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip() and "%|" not in line]
        raise Refusal(f"{Path(command[0]).name} {Path(command[1]).name} stops with: {(lines or ['nothing'])[-1][:300]}")


def environment(name: str) -> Path:
    """The Python of a peer's environment, made once. Raises Refusal if it cannot be installed."""
    peer = PEERS[name]
    python, done = peer.folder / "bin" / "python", peer.folder / ".installed"
    if not done.exists():
        call(sys.executable, "-m", "venv", "--clear", peer.folder)
        needs = [f"{peer.package}=={peer.version}", *PINNED]
        if peer.vendored_gguf:  # its converter needs a newer gguf-py than the package index has
            needs += [str(build_llama.sources(build_llama.cache_dir()).resolve() / "gguf-py"), "sentencepiece"]
        call(python, "-m", "pip", "install", "-q", *needs)
        done.touch()
    return python


def calibration_windows(checkpoint: HfCheckpoint, text: Path) -> np.ndarray:
    """SAMPLES windows spread over the text, int64 (SAMPLES, WINDOW), each as llama-imatrix cuts them."""
    found = TextEncoder(checkpoint).windows(text.read_text(encoding="utf-8"), WINDOW)
    picked = np.unique(np.linspace(0, len(found) - 1, min(SAMPLES, len(found))).astype(int))
    return np.array([found[i] for i in picked], dtype=np.int64)


def auto_round(name: str, checkpoint: HfCheckpoint, text: Path, mix: str, out: Path, folder: Path) -> None:
    """AutoRound's own file. Raises Refusal."""
    windows = calibration_windows(checkpoint, text)
    np.save(folder / "windows.npy", windows)
    kind = AUTO_ROUND_MIXES.get(mix, mix.lower())
    pre = str(checkpoint.metadata()["tokenizer.ggml.pre"].value)
    script = SCRIPTS / PEERS[name].script
    arguments: list[str | Path] = [
        checkpoint.path.resolve(),
        folder / "windows.npy",
        kind,
        str(PEERS[name].iterations),
        str(len(windows)),
        pre,
    ]
    call(environment(name), script, *arguments, folder / "made")
    files = sorted((folder / "made").rglob("*.gguf"))
    if len(files) != 1:
        raise Refusal(f"AutoRound wrote {len(files)} GGUF files")
    files[0].replace(out)


def gptqmodel(name: str, checkpoint: HfCheckpoint, text: Path, mix: str, out: Path, folder: Path) -> None:
    """GPTQModel's blocks, at the types of llama-quantize's mix, in a GGUF file of ours. Raises Refusal.

    It writes no GGUF file and has no calibration for these types, so ``text`` is not used; the embedding and the
    head, which it leaves alone, have the mix's types and the method ``ggml``.
    """
    plan = standard_plan(checkpoint, mix, None)
    names = linear_maps(checkpoint)
    missing = sorted({plan.tensors[target].format for target, _ in names.values()} - set(GPTQMODEL_TYPES))
    if missing:
        raise Refusal(f"GPTQModel {PEERS[name].version} has no type {', '.join(missing)}, which the mix needs")
    types = {module: plan.tensors[target].format.lower() for module, (target, _) in names.items()}
    (folder / "types.json").write_text(json.dumps(types))
    call(environment(name), SCRIPTS / PEERS[name].script, checkpoint.path.resolve(), folder / "types.json", folder / "made")
    transplant(checkpoint, plan, names, folder / "made", out)


def linear_maps(checkpoint: HfCheckpoint) -> dict[str, tuple[str, int]]:
    """Hugging Face module → GGUF tensor and expert, for everything quantizable inside the decoder layers."""
    out = {}
    for shard in checkpoint.shards:
        for entry in shard.entries:
            target = checkpoint.family.to_gguf(entry)
            if target and target[0] in checkpoint.tensors and checkpoint.info(target[0]).quantizable and ".layers." in entry:
                out[entry.removesuffix(".weight")] = (target[0], target[1] or 0)
    return out


def transplant(checkpoint: HfCheckpoint, plan: Plan, names: dict[str, tuple[str, int]], made: Path, out: Path) -> None:
    """Write the plan as a file, then put the peer's blocks in the place of ours. Raises Refusal if a size differs."""
    from safetensors import safe_open

    blocks: dict[str, np.ndarray] = {}
    for file in sorted(made.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            blocks.update({key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(".qweight")})  # noqa: SIM118
    draft = out.with_suffix(".draft.gguf")
    run(checkpoint, plan, draft, force=True)
    manifest_path(draft).unlink()
    entries = GgufFile(draft).entries
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    with draft.open("r+b") as handle:
        for module, (target, expert) in names.items():
            packed, entry = blocks.get(f"{module}.qweight"), entries[target]
            size = entry.nbytes // checkpoint.info(target).experts
            if packed is None or packed.nbytes != size:
                raise Refusal(f"GPTQModel left {module} as it was" if packed is None else f"{module} has {packed.nbytes} bytes")
            count = heads.get(target.split(".", 2)[-1]) if checkpoint.family.permutes_qk else None
            if count:  # llama.cpp's order of rows
                packed = packed.reshape(int(checkpoint.config[count]), 2, -1, packed.shape[1]).swapaxes(1, 2)
            handle.seek(entry.start + expert * size)
            handle.write(np.ascontiguousarray(packed).tobytes())
    draft.replace(out)


def export(name: str, model_folder: Path, calibration_file: Path, mix: str, out: Path) -> Path | str:
    """A peer's GGUF file of the model at a mix, under ``out``; or the reason why there is none."""
    make = gptqmodel if PEERS[name].package == "gptqmodel" else auto_round
    checkpoint = open_checkpoint(model_folder)
    if not isinstance(checkpoint, HfCheckpoint):
        return "peers need the Hugging Face folder of the model"
    try:
        with tempfile.TemporaryDirectory() as temporary:
            make(name, checkpoint, calibration_file, mix, out, Path(temporary))
        open_checkpoint(out)
    except (Refusal, QuantkitError) as error:
        return str(error)
    return out


def main() -> None:
    """Every peer at every mix: bytes, seconds and divergence, or the reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--mixes", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--peers", default=";".join(PEERS), help="names, separated by semicolons")
    parser.add_argument("--keep", type=Path, help="folder for the files")
    parser.add_argument("--text", type=Path, help="text to judge on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        calibration_files(Path(temporary))
        for name in options.peers.split(";"):
            with contextlib.suppress(Refusal):  # so that seconds do not count it; export gives the reason
                environment(name)
            for mix in options.mixes.split(","):
                out = folder / f"{options.model.resolve().name}-{name.replace(', ', '-')}-{mix}.gguf"
                started = time.perf_counter()
                made = export(name, options.model, Path(temporary) / "all.txt", mix, out)
                words = made if isinstance(made, str) else f"{made.stat().st_size:,} B"
                if isinstance(made, Path) and options.text:
                    judged = compare(options.model, [made], [options.text], limit=32768).candidates[0].divergence
                    words += f", KLD {judged.mean_kld:.5f} ± {judged.mean_kld_error:.5f}"
                print(f"{name:20} {mix:7} {time.perf_counter() - started:6.0f} s  {words}", flush=True)


if __name__ == "__main__":
    main()
