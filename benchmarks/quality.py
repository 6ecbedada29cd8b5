"""Everything against everything at equal bytes: llama-quantize, other quantizers, and each of quantkit's methods added in turn.

    make bench-quality                                          # everything
    python benchmarks/quality.py --models qk-dense-6m --mixes Q4_K_M Q2_K --judges llama --no-peers
    python benchmarks/quality.py --dev --only-ablation          # development text; nothing is recorded

For each model and stock mix, at no more bytes than llama-quantize's file and from the same calibration text: the
largest uniform format, then allocation alone (effort 1), error feedback (effort 2 with ``ldlq`` alone), the default
(effort 2, ``two_sided``), ``sequential`` (effort 3), ``refine`` after it (effort 4) and ``refit`` before both (effort
5); the highest effort once more with head and embedding at the stock mix's types; the other quantizers of peers.py at
their own bytes. From effort 2 on, outlier channels are moved first where that helps; a row says so (``rescaled``).

The judged texts are read only to judge. Code and technical text are of kinds that calibration has none of; of both the
end is taken, because the beginning of the code is in the package's own mix, which experts that no token reached fall
back to. Results are saved after every mix; rows of models, mixes and files that a run does not make stay from earlier
runs, and every row names its run. Time for each model, measured: see seconds in the results file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from allocation import JUDGED_TOKENS, calibration_files, make_stock
from common import SHARED, TOOLS, environment, tool
from quality_rows import ABLATION, KEPT, STOCK, Entry, floor_rows, judge_entries, print_summary, record, summary
from train_models import RECIPES, trained

from quantkit import api
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.encoders import get_encoder
from quantkit.errors import QuantkitError
from quantkit.formats import formats, get_format
from quantkit.planning.budget import Request
from quantkit.planning.plan import Plan
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as write_file
from quantkit.session import FOLDED, Options, analysis_of

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS")
NEIGHBOURS = {
    "Q5_K_M": ("Q5_K_S",), "Q4_K_M": ("Q4_K_S",), "Q3_K_M": ("Q3_K_S", "Q3_K_L"), "Q2_K": ("Q2_K_S",), "IQ2_XS": ("IQ2_S", "IQ2_M"),
}  # fmt: skip
LEGACY = ("Q4_0", "Q5_0", "Q8_0")  # mixes for a model whose rows no block of 256 fits
SMALL = "stories260K"
MODELS = ("qk-dense-6m", "qk-moe-11m", *RECIPES, SMALL)
PEER_MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
FLOOR_MIXES = ("Q5_K_M", "Q6_K", "Q8_0")
TEXTS: dict[str, tuple[str, int | None]] = {  # file, and how many characters of its end are judged (None: all)
    "stories": ("tinystories/heldout.txt", None), "wikitext": ("wikitext2/wiki.test.raw", None),
    "code": ("calibration/code.utf8", 150_000), "technical": ("calibration/technical.utf8", 150_000),
}  # fmt: skip
DEV: dict[str, tuple[str, int | None]] = {"stories": ("tinystories/stories.txt", 150_000), "c4": ("calibration/c4.utf8", 150_000)}
TOKENS = 200_000  # of calibration text
DEFAULT_EFFORT = 2
WAYS = {
    1: "effort 1: allocation alone",
    2: "effort 2: two_sided",
    3: "effort 3: sequential",
    4: "effort 4: and refine",
    5: "effort 5: and refit",
}
LDLQ = "effort 2, ldlq instead of two_sided"


@dataclass
class Bench:
    """One model while its files are made. seconds: of every step."""

    model: Path
    folder: Path
    given: argparse.Namespace
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint = field(init=False)
    calibration: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = open_checkpoint(self.model)
        self.calibration = calibration_files(self.folder)

    @property
    def small(self) -> bool:
        """Whether it is the model that only legacy formats fit."""
        return self.model.name == SMALL

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record how long a step takes, failed or not."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(time.perf_counter() - started, 3)

    def options(self, effort: int) -> Options:
        """Efforts from 2 on share an analysis."""
        return Options(calibration=self.calibration, tokens=TOKENS, effort=effort, work=self.folder / f"work-{min(effort, 2)}")

    def file(self, what: str) -> Path:
        """A name for the file of an entry."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', what)}.gguf"


def stock_entry(bench: Bench, mix: str, part: str, what: str, against: str = STOCK) -> Entry:
    """llama-quantize's file of a mix, or what it said."""
    path = bench.file(f"stock {mix}")
    try:
        with bench.timed(f"{mix}: llama-quantize"):
            tool("llama-quantize", "--imatrix", bench.folder / "stock-imatrix.gguf", bench.folder / "bf16.gguf", path, mix)
    except SystemExit as stop:
        path.unlink(missing_ok=True)
        return Entry(what, part, reason=[line for line in str(stop).splitlines() if line.strip()][-1])
    return Entry(what, part, path, against=against)


def uniform_entry(bench: Bench, mix: str, size: int) -> Entry:
    """The largest file of one format everywhere that fits, by ggml's method; K-quants before others of the same size."""
    _, stats = analysis_of(bench.checkpoint, bench.options(1))
    names = [fmt.name for fmt in formats() if fmt.is_quantized() and get_encoder("ggml").writes(fmt)]
    plans = [uniform_plan(bench.checkpoint, name, stats) for name in names]
    fitting = [plan for plan in plans if plan.file_bytes <= size]
    if not fitting:
        return Entry("uniform", "uniform", reason=f"no format fits into {size:,} bytes")
    plan = max(fitting, key=lambda plan: (plan.file_bytes, plan.name.endswith("_K")))
    path = bench.file(f"{plan.name} at {mix}")
    try:
        with bench.timed(f"{mix}: uniform"):
            write_file(bench.checkpoint, plan, path, stats=stats, force=True)
    except QuantkitError as error:
        return Entry("uniform", "uniform", reason=str(error))
    return Entry("uniform", "uniform", path, facts={"format": plan.name.removeprefix("uniform-")})


def dynamic_entry(
    bench: Bench, mix: str, what: str, part: str, size: int, effort: int, keep: tuple[str, ...] = (), against: str = STOCK,
    plan: Plan | None = None,
) -> Entry:  # fmt: skip
    """quantkit's file of at most ``size`` bytes, through the public API; of a given plan if there is one."""
    path = bench.file(f"{what} at {mix}")
    request = Request() if plan is not None else Request(size=str(size))
    try:
        with bench.timed(f"{mix}: {what}"):
            made = api.quantize(
                bench.model, path, plan if plan is not None else "dynamic", request, keep=keep, force=True,
                options=bench.options(effort),
            )[1]  # fmt: skip
    except QuantkitError as error:
        return Entry(what, part, reason=str(error), effort=effort)
    quantized = [entry for entry in made.tensors.values() if get_format(entry["format"]).is_quantized()]
    facts = {
        "predicted_kld": made.plan["predicted_kld"], "methods": dict(Counter(entry["method"] for entry in quantized)),
        "formats": dict(Counter(entry["format"] for entry in quantized)), "notes": made.notes,
        "rescaled": made.source["identity"] != bench.checkpoint.identity,
    }  # fmt: skip
    return Entry(what, part, path, against=against, effort=effort, facts=facts)


def ablation_entries(bench: Bench, mix: str, size: int) -> list[Entry]:
    """Uniform, then each method added in turn."""
    out = [uniform_entry(bench, mix, size)]
    for effort in bench.given.efforts:
        made = dynamic_entry(bench, mix, WAYS[effort], ABLATION, size, effort)
        if effort == DEFAULT_EFFORT and made.path is not None:
            plan = Plan.read(bench.options(effort).work / api.PLAN)  # type: ignore[operator]
            plan.tensors = {
                name: replace(entry, method="ldlq") if entry.method in ("two_sided", "search") else entry
                for name, entry in plan.tensors.items()
            }
            out.append(dynamic_entry(bench, mix, LDLQ, ABLATION, size, effort, plan=plan))
        out.append(made)
    return out


def kept_entries(bench: Bench, mix: str, stock: Path) -> list[Entry]:
    """The highest effort, with head and embedding at the types they have in ``stock``."""
    tensors = open_checkpoint(stock).tensors
    keep = tuple(
        f"^{re.escape(name)}$={tensors[name].dtype}" for name in ("token_embd.weight", "output.weight") if name in tensors
    )
    effort = max(bench.given.efforts)
    what = f"{WAYS[effort]}; head and embedding as stock"
    return [dynamic_entry(bench, mix, what, KEPT, stock.stat().st_size, effort, keep)]


def peer_entries(bench: Bench, mix: str) -> list[Entry]:
    """The files of other quantizers, and ours at the bytes of each."""
    from peers import PEERS, Refusal, export
    from peers import environment as install

    out = []
    for name in PEERS:
        with contextlib.suppress(Refusal), bench.timed(f"install {name}"):  # export gives the reason
            install(name)
        with bench.timed(f"{mix}: {name}"):
            made = export(name, bench.model, bench.folder / "all.txt", mix, bench.file(f"{name} {mix}"))
        if isinstance(made, str):
            out.append(Entry(name, "peer", reason=made))
            continue
        out.append(Entry(name, "peer", made))
        what = f"effort {DEFAULT_EFFORT} at the bytes of {name}"
        out.append(dynamic_entry(bench, mix, what, "peer", made.stat().st_size, DEFAULT_EFFORT, against=name))
    return out


def mix_rows(bench: Bench, mix: str, texts: dict[str, Path]) -> list[dict[str, Any]]:
    """Make and judge all files at the bytes of one stock mix; they are deleted afterwards."""
    given, where = bench.given, {"model": name_of(bench.model), "mix": mix}
    anchor = stock_entry(bench, mix, STOCK, STOCK, against="")
    if anchor.path is None:
        return judge_entries(bench.model, where, [anchor], texts, given.judges, given.tokens)
    entries = [anchor, *ablation_entries(bench, mix, anchor.path.stat().st_size)]
    if not given.only_ablation:
        entries += [stock_entry(bench, other, "neighbour", f"llama-quantize {other}") for other in NEIGHBOURS.get(mix, ())]
        entries += kept_entries(bench, mix, anchor.path) if not bench.small else []
        entries += peer_entries(bench, mix) if given.peers and mix in PEER_MIXES and not bench.small else []
    with bench.timed(f"{mix}: judge"):
        rows = judge_entries(bench.model, where, entries, texts, given.judges, given.tokens)
    if mix in FLOOR_MIXES and "llama" in given.judges:
        with bench.timed(f"{mix}: floor"):
            brain = bench.folder / "bf16.gguf" if mix == next(m for m in given.mixes if m in FLOOR_MIXES) else None
            rows += floor_rows(bench.model, where, brain, anchor.path, texts, given.tokens)
    for entry in entries:
        if entry.path is not None:
            entry.path.unlink()
    return rows


def name_of(model: Path) -> str:
    """The name of a model in the tables: a trained one without its hash."""
    return next((name for name in RECIPES if model.name.startswith(name)), model.name)


def judged_texts(table: dict[str, tuple[str, int | None]], names: list[str], folder: Path) -> dict[str, Path]:
    """The texts of a table as files."""
    out = {}
    for name in names:
        source, size = table[name]
        text = (SHARED / "data" / source).read_text(encoding="utf-8")
        out[name] = folder / f"judged-{name}.txt"
        out[name].write_text(text if size is None else text[-size:], encoding="utf-8")
    return out


def prepare(bench: Bench) -> None:
    """What all mixes of a model share: the BF16 file, llama-imatrix, the analyses."""
    with bench.timed("BF16 file and llama-imatrix"):
        make_stock(bench.checkpoint, bench.folder, ())
    for effort in sorted({1, *(min(e, 2) for e in bench.given.efforts)}):
        with bench.timed(f"analyze, effort {effort}"):
            api.analyze(bench.model, bench.options(effort))
    folded = bench.folder / "work-2" / FOLDED
    words = "rescaled" if any(path.is_dir() or path.suffix == ".json" for path in folded.glob("*")) else "not rescaled"
    print(f"{name_of(bench.model)}: {words}; seconds {bench.seconds}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--mixes", nargs="+", choices=sorted({*MIXES, *LEGACY}), metavar="MIX",
        help=f"default {' '.join(MIXES)}; for {SMALL} {' '.join(LEGACY)}",
    )  # fmt: skip
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help=f"of {', '.join(TEXTS)}; with --dev of {', '.join(DEV)}")
    parser.add_argument("--judges", nargs="+", default=["torch", "llama"], choices=("torch", "llama"))
    parser.add_argument("--efforts", nargs="+", type=int, default=[1, 2, 3], choices=range(1, 6), metavar="N")
    parser.add_argument("--tokens", type=int, default=JUDGED_TOKENS, help="of each judged text")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--only-ablation", action="store_true", help="only the stock mix, uniform and the ablation")
    parser.add_argument("--dev", action="store_true", help="judge on development text and record nothing")
    given = parser.parse_args()
    table = DEV if given.dev else TEXTS
    given.texts = given.texts or list(table)
    if unknown := [name for name in given.texts if name not in table]:
        parser.error(f"unknown text {unknown[0]!r}; there are {', '.join(table)}")
    given.efforts = sorted(set(given.efforts))
    return given


def model_rows(name: str, given: argparse.Namespace, run: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of one model; recorded after every mix."""
    known = LEGACY if name == SMALL else MIXES
    mixes = [mix for mix in given.mixes or known if mix in known]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        model = trained(name) if name in RECIPES else SHARED / "models" / name
        bench = Bench(model, Path(temporary), argparse.Namespace(**{**vars(given), "mixes": mixes}))
        bench.seconds["train if missing"] = round(time.perf_counter() - started, 3)
        facts["seconds"][name] = bench.seconds
        texts = judged_texts(DEV if given.dev else TEXTS, given.texts, bench.folder)
        prepare(bench)
        for mix in mixes:
            rows += mix_rows(bench, mix, texts)
            if not given.dev:
                record(rows, run, facts, set(RECIPES))
    print(f"{name}: seconds {bench.seconds}", flush=True)
    return rows


def main() -> None:
    """All models; prints rows as they come, then the limits; writes benchmarks/results/quality.json."""
    given = arguments()
    if not SHARED.exists() or not TOOLS.exists():
        raise SystemExit("needs ../shared and the tools of `python tools/build_llama.py`")
    run = datetime.now().isoformat(timespec="seconds")
    facts: dict[str, Any] = {**environment(), "options": vars(given), "calibration_tokens": TOKENS, "seconds": {}}
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += model_rows(name, given, run, facts)
    print_summary(summary(rows, set(RECIPES)))


if __name__ == "__main__":
    main()
