"""quantkit analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import common, emit_json, guarded, make_options, print_table
from quantkit.progress import stop_all


@click.command("analyze", help="What hurts: the cost of every tensor in every format, super weights, outliers.")
@click.argument("model", type=click.Path(path_type=Path))
@common
@click.option("--against", help="Another model of this architecture, or FILE+ADAPTER: show where its weights moved, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path, against: str | None, as_json: bool, **values: Any) -> None:
    """Measure, write the work directory, print the table."""
    import json

    if against is not None:
        print_difference(model, Path(against), as_json)
        return

    from quantkit.analysis.run import ANALYSIS, IMATRIX, PICTURE, work_directory
    from quantkit.api import analyze
    from quantkit.session import FOLDED

    options = make_options(values)
    sensitivity = analyze(model, options)
    stop_all()
    if as_json:
        emit_json(json.loads(sensitivity.to_json()))
        return
    work = work_directory(model, values["work"])
    if sensitivity.identity != sensitivity.calibration["source"]:
        click.echo("outlier channels: found, and moved by an exact rescaling; the analysis is of the rescaled weights")
        work = work / FOLDED
    print_sensitivity(sensitivity)
    print_together(sensitivity)
    print_schemes(sensitivity)
    print_coverage(sensitivity)
    for weight in sensitivity.super_weights:
        click.echo(
            f"super weight: {weight['tensor']}[{weight['row']}, {weight['column']}] = {weight['value']:.4g} "
            f"(input {weight['input_spike']:.0f} ×, output {weight['output_spike']:.0f} × its root mean square)"
        )
    if not sensitivity.super_weights:
        searched = sensitivity.calibration.get("imatrix") is None
        click.echo("super weights: none found" if searched else "super weights: not searched, the statistics came from a file")
    for name, tensor in sensitivity.tensors.items():
        if tensor.uncovered_experts:
            click.echo(f"not reached by the calibration text: experts {tensor.uncovered_experts} of {name}", err=True)
    click.echo(f"written: {work / ANALYSIS}, {work / IMATRIX}, {work / PICTURE}")


def print_difference(model: Path, against: Path, as_json: bool) -> None:
    """Which weights a fine-tune or an adapter moved, by role and layer."""
    from dataclasses import asdict

    from quantkit.analysis.difference import differences
    from quantkit.evaluation.candidates import open_candidate

    before, after = open_candidate(model), open_candidate(against)
    found = differences(before, after)
    stop_all()
    if as_json:
        emit_json([asdict(moved) for moved in found])
        return
    rows = [
        [m.tensor, m.role, f"{m.energy:.2e}", f"{m.rank:.0f} of {m.full}", f"{m.top:.0%}"]
        for m in sorted(found, key=lambda m: -m.energy)
    ]  # fmt: skip
    columns = ["tensor", "role", "energy moved ÷ weights", "directions for 90 %", "largest"]
    print_table(f"{len(found)} of {len(before.tensors)} tensors moved, those that moved most first", columns, rows, left=2)


def print_coverage(sensitivity: Any) -> None:
    """How many tokens routed experts saw, before and after those with too few got more."""
    from quantkit.analysis.coverage import COLUMNS, coverage_rows

    if sensitivity.coverage:
        tokens = sensitivity.coverage[0]["tokens"]
        print_table(f"routed experts: tokens each saw of {tokens:,}", COLUMNS, coverage_rows(sensitivity.coverage))


def print_together(sensitivity: Any) -> None:
    """How errors of neighbours add up, and what groups of tensors really cost where single ones were not measured."""
    from quantkit.analysis.neighbours import neighbour_rows

    if sensitivity.neighbours:
        rows = neighbour_rows({name: t.role for name, t in sensitivity.tensors.items()}, sensitivity.neighbours)
        title = f"neighbours, both in {sensitivity.neighbours[0]['format']}: measured KLD together ÷ sum of each alone"
        print_table(title, ["roles", "pairs", "median (range)"], rows)
    if sensitivity.groups:
        parts = {-1: "", 0: "first third", 1: "middle third", 2: "last third"}
        rows = [
            [g["role"], parts[g["depth"]], g["format"], f"{g['estimated']:.1e}", f"{g['measured']:.1e}",
             f"{g['measured'] / g['estimated']:.2f}" if g["estimated"] else "–"]
            for g in sensitivity.groups
        ]  # fmt: skip
        columns = ["role", "layers", "format", "estimated", "measured", "ratio"]
        print_table("groups, rounded by ggml's search: KLD in nats per token", columns, rows, left=3)


def print_schemes(sensitivity: Any) -> None:
    """What running the model with quantized activations or cache would cost."""
    rows = [
        [
            s["name"],
            s["what"],
            f"{s['kld']:.2e} ± {s['kld_error']:.0e}" if s["kld"] is not None else f"not possible: {s['why_not']}",
        ]
        for s in sensitivity.schemes
    ]
    print_table("activations and KV cache", ["run as", "what is quantized", "measured KLD, nats per token"], rows, left=2)


def print_sensitivity(sensitivity: Any) -> None:
    """One row a tensor: errors at 4.5 bits, activation costs, predicted KLD along the formats."""
    from quantkit.analysis.plot import reference_format
    from quantkit.formats import get_format

    shown = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    if not any("Q4_K" in t.formats for t in sensitivity.tensors.values()):
        shown = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    rows = []
    for name, tensor in sensitivity.tensors.items():
        cost = tensor.formats[reference_format(tensor)]
        quantized = sorted((f for f in tensor.formats if get_format(f).is_quantized()), key=lambda f: get_format(f).bpw())
        costs = [tensor.formats.get(f) for f in shown] if set(shown) & set(quantized) else [None] * len(shown)
        rows.append([
            name, tensor.role, f"{cost.weight_error:.1e}", f"{cost.activation_error:.1e}",
            "–" if tensor.int8_activation_error is None else f"{tensor.int8_activation_error:.0e}",
            "–" if tensor.fp8_activation_error is None else f"{tensor.fp8_activation_error:.0e}",
            f"{tensor.kurtosis:.1f}", str(tensor.outlier_channels), *("–" if c is None else f"{c.predicted_kld:.1e}" for c in costs),
        ])  # fmt: skip
    print_table(
        f"{sensitivity.model}: relative errors at about 4.5 bits; predicted KLD in nats per token ({sensitivity.estimator})",
        ["tensor", "role", "weight error", "output error", "INT8 act.", "FP8 act.", "kurtosis", "outlier channels", *shown],
        rows, left=2,
    )  # fmt: skip
