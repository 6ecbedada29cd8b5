"""A run as one offline HTML file: curves, groups with their advantages, advice, and how it was made."""

from __future__ import annotations

import io
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import refuse_existing, write_text
from quantkit.errors import AdapterError
from quantkit.rl.advice import advice_for_grpo, advice_for_sft
from quantkit.rl.base import BINDING
from quantkit.rl.folder import LOG, RUN, SAMPLES, RunFolder

TEMPLATE = Path(__file__).parent / "data" / "report.html.jinja"
METADATA = re.compile("<metadata>.*?</metadata>", re.DOTALL)
LINE, BAND = "#0072b2", "#56b4e9"  # Okabe and Ito's blues
NAMES = {
    "reward": "reward, all together", "loss": "loss, nats/token", "kl": "divergence from the start (KL), nats/token",
    "entropy": "entropy, nats/token", "completions/mean_length": "length of completions, tokens",
    "completions/clipped_ratio": "completions that did not end, share", "groups/dead": "dead groups, share",
    "groups/dead_nothing": "groups without any reward, share", "clip_ratio/region_mean": "clipped tokens, share",
    "sampling/sampling_logp_difference/mean": "mismatch of engine and trainer, nats/token", "grad_norm": "norm of the gradient",
    "mean_token_accuracy": "tokens guessed right, share", "rewards/margins": "margin of chosen over rejected",
    "rewards/accuracies": "pairs ranked right, share",
}  # fmt: skip


def write_report(run: Path, out: Path, force: bool = False) -> Path:
    """Write the report of a run's folder, also of one that is still running. Raises AdapterError if it is none, OutputError."""
    if not (run / RUN).exists():
        raise AdapterError(f"{run} has no {RUN}", hint="give the folder of a run of `quantkit rl`")
    refuse_existing(out, force)
    write_text(out, render(RunFolder(run)))
    return out


def render(folder: RunFolder) -> str:
    """The document as text; everything it shows is inside it."""
    from jinja2 import Environment, select_autoescape
    from markupsafe import Markup

    said = json.loads((folder.path / RUN).read_text(encoding="utf-8"))
    log = [row for row in folder.lines(LOG) if "train_runtime" not in row]
    method = said["run"]["method"]
    binding = folder.path / BINDING
    base = json.loads(binding.read_text())["base"] if binding.exists() else str(said["run"]["base"])[:12]
    environment = Environment(
        autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True, lstrip_blocks=True
    )
    names = curves(log)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{method} of {folder.path.resolve().name}", method=method, base=base, seconds=said.get("seconds"),
        steps=max((row["step"] for row in log), default=0), advice=(advice_for_sft if method == "sft" else advice_for_grpo)(log),
        numbers=[_ends(log, name) for name in names], groups=groups(folder.lines(SAMPLES)), run=json.dumps(said, indent=1),
        pictures=[{"name": title(name), "svg": Markup(curve(log, name))} for name in names],
    )  # fmt: skip


def curves(log: list[dict[str, Any]]) -> list[str]:
    """Which of the log's numbers are shown: every reward first."""
    found = list(dict.fromkeys(key for row in log for key in row))
    rewards = [name for name in found if name.startswith("rewards/") and name.endswith("/mean")]
    return ["reward"] * ("reward" in found and len(rewards) > 1) + rewards + [n for n in NAMES if n in found and n != "reward"]


def title(name: str) -> str:
    """A number's name for people."""
    return NAMES.get(name) or name.removeprefix("rewards/").removesuffix("/mean")


def curve(log: list[dict[str, Any]], name: str) -> str:
    """A curve over steps as SVG, with the moving mean of a twentieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib.figure import Figure

    steps, values = (
        np.array(part) for part in zip(*((row["step"], row[name]) for row in log if row.get(name) is not None), strict=True)
    )
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color=BAND, linewidth=1, marker="o" if len(steps) < 30 else "", markersize=3)
    width = max(1, len(values) // 20)
    if width > 1:
        axes.plot(steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid"), color=LINE, linewidth=2)
    axes.set_title(title(name), fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quantkit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return METADATA.sub("", text[text.index("<svg") :])


def _ends(log: list[dict[str, Any]], name: str) -> dict[str, str]:
    values = [row[name] for row in log if row.get(name) is not None]
    tenth = max(1, len(values) // 10)
    first, last = (sum(part) / len(part) for part in (values[:tenth], values[-tenth:]))
    return {"name": title(name), "first": f"{first:.4g}", "last": f"{last:.4g}"}


def groups(samples: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Groups of samples with rewards and advantages, evenly spread over the run."""
    found = []
    for (step, _), some in groupby(samples, key=lambda row: (row["step"], row["group"])):
        rows = list(some)
        names = list(rows[0]["rewards"])
        found.append({
            "step": step, "prompt": rows[0]["prompt"], "names": names,
            "rows": [
                {"completion": row["completion"], "advantage": f"{row['advantage']:.2f}",
                 "rewards": ["" if row["rewards"][n] is None else f"{row['rewards'][n]:.3g}" for n in names]}
                for row in rows
            ],
        })  # fmt: skip
    return found if len(found) <= most else [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
