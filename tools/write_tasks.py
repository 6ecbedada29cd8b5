"""Write the generated parts of quantkit/evaluation/lm_eval/offline: BLiMP's paradigms, and the few documents of each task.

    python tools/write_tasks.py DATA

DATA has the folders arc, piqa, blimp, gsm8k and wikitext2. Documents are the first of each file, so that a task's first
results on the sample and on the whole data agree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quantkit.evaluation.lm_eval.documents import TASKS, TITLE

DOCUMENTS = 12  # of a file
PAIRS = 2  # of a BLiMP paradigm, of which there are many


def write(data: Path) -> None:
    """Write both."""
    paradigms = sorted(path.stem for path in (data / "blimp").glob("*.jsonl"))
    write_blimp(paradigms)
    sample = TASKS / "sample"
    for folder in ("arc", "piqa", "blimp", "gsm8k", "wikitext2"):
        (sample / folder).mkdir(parents=True, exist_ok=True)
    counts = {f"blimp/{paradigm}.jsonl": PAIRS for paradigm in paradigms}
    for subset in ("easy", "challenge"):
        counts |= {f"arc/arc_{subset}_{split}.jsonl": DOCUMENTS for split in ("train", "test")}
    counts |= dict.fromkeys(("piqa/valid.jsonl", "piqa/valid-labels.lst", "gsm8k/train.jsonl", "gsm8k/test.jsonl"), DOCUMENTS)
    for name, count in counts.items():
        lines = (data / name).read_text(encoding="utf-8").splitlines()[:count]
        (sample / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (sample / "wikitext2" / "wiki.test.raw").write_text(first_article(data), encoding="utf-8")


def write_blimp(paradigms: list[str]) -> None:
    """A task for each paradigm, and their group."""
    folder = TASKS / "blimp"
    folder.mkdir(exist_ok=True)
    for paradigm in paradigms:
        text = f"include: _template\ntask: blimp_{paradigm}_local\ndataset_kwargs:\n  paradigm: {paradigm}\n"
        (folder / f"blimp_{paradigm}_local.yaml").write_text(text)
    members = "".join(f"  - blimp_{paradigm}_local\n" for paradigm in paradigms)
    (folder / "blimp_local.yaml").write_text(
        f"group: blimp_local\ntask:\n{members}aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    weight_by_size: false\nmetadata:\n  version: 2.0\n"
    )


def first_article(data: Path) -> str:
    """The first article of WikiText-2's test split, as it is in the file."""
    lines = (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")
    starts = [number for number, line in enumerate(lines) if TITLE.fullmatch(line)]
    return "\n".join(lines[: starts[1]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    write(parser.parse_args().data)
