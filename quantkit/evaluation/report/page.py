"""The HTML report: one offline file, rendered from the same Report as the table and the JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.analysis.coverage import COLUMNS, coverage_rows
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint.files import write_text
from quantkit.errors import PlanError
from quantkit.evaluation.candidates import open_candidate
from quantkit.evaluation.compare import Report, identity_of, worst_estimate
from quantkit.evaluation.report import charts, sections, tasks
from quantkit.evaluation.report.plan import cost_map, plan_maps, plan_reasons
from quantkit.evaluation.report.sections import Sample, samples_of

if TYPE_CHECKING:
    from quantkit.evaluation.board import Table
    from quantkit.evaluation.lm_eval.results import EvalReport
    from quantkit.planning.sweep import Sweep

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Extras:
    """What a report may show beside its own numbers.

    reasons: of each candidate, in the report's order, why its tensors have their formats (``plan_reasons``). sweep: drawn
    behind the candidates. results: answers to tasks. samples: texts side by side. board: tables of a leaderboard
    (``board.render``). hardware, command: in words.
    """

    reasons: Sequence[Mapping[str, str]] = ()
    sweep: Sweep | None = None
    results: EvalReport | None = None
    samples: Sequence[Sample] = ()
    board: Sequence[Table] = ()
    hardware: str = ""
    command: str = ""


def require_same_models(reference: Path, candidates: Sequence[Path], results: EvalReport | None, sweep: Sweep | None) -> None:
    """Raise PlanError for results or a sweep of other models, which a report must not show beside these."""
    name = reference.resolve().name
    identities = [open_candidate(path).identity for path in candidates] if results is not None else []
    if results is not None and (not results.models or results.models[0].identity != identity_of(reference)):
        asked = results.models[0].name if results.models else "no model"
        raise PlanError(f"the results are of {asked}, not of {name}", hint="run `quantkit eval` with this original first")
    if results is not None and len(results.models) > 1 and not {m.identity for m in results.models} & set(identities):
        raise PlanError("the results are of none of the candidates", hint="run `quantkit eval` with these files")
    if sweep is not None and sweep.model != name:
        raise PlanError(f"the sweep is one of {sweep.model}, not of {name}", hint="run `quantkit sweep` on this original")


def write_html(report: Report, path: Path, sensitivity: Sensitivity | None = None, extras: Extras | None = None) -> None:
    """Write the report: everything that is known of the candidates, and of the analysis if it is given.

    Raises OutputError if the file cannot be written.
    """
    write_text(path, render_html(report, sensitivity, extras))


def render_html(report: Report, sensitivity: Sensitivity | None = None, extras: Extras | None = None) -> str:
    """The document as text; everything it shows is inside it, and its content policy lets it load nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(DATA), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"visible": sections.visible, "printable": sections.printable}
    script = (DATA / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        _context(report, extras or Extras()),
        **_analysis(sensitivity),
        style=Markup((DATA / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        document=Markup(embedded(report.to_json())),
    )


def embedded(document: str) -> str:
    """A JSON document such that no HTML parser finds a tag in it; it still says the same."""
    compact = json.dumps(json.loads(document), separators=(",", ":"))
    return compact.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _context(report: Report, extras: Extras) -> dict[str, Any]:
    names = charts.short_names([c.name for c in report.candidates])
    known = [(c, name) for c, name in zip(report.candidates, names, strict=True) if c.breakdown is not None]
    return {
        "report": report,
        "lead": sections.lead(report),
        "columns": sections.HEADLINE,
        "rows": [(c.name, sections.headline(c)) for c in report.candidates],
        "estimate": worst_estimate(report),
        "footprint_columns": sections.FOOTPRINT,
        "footprints": sections.footprint_rows(report),
        "size": charts.size_figure(report, extras.sweep) if report.candidates else None,
        "predicted": charts.predicted_figure(report),
        "breakdown": sections.breakdown_tables(report),
        "broken": [name for _, name in known],
        "worst": [(c.name, sections.worst_tokens(c)) for c, _ in known if sections.worst_tokens(c)],
        "plans": plan_maps(report.candidates, extras.reasons),
        "tasks": tasks.task_rows(extras.results) if extras.results else [],
        "members": tasks.task_rows(extras.results, members=True) if extras.results else [],
        "accuracy": tasks.accuracy_figure(extras.results) if extras.results else None,
        "results": extras.results,
        "samples": sections.side_by_side(extras.samples),
        "board": extras.board,
        "hardware": extras.hardware,
        "command": extras.command,
    }


def _analysis(sensitivity: Sensitivity | None) -> dict[str, Any]:
    if sensitivity is None:
        return {"sensitivity": None, "errors": [], "cost": None, "coverage": None}
    return {
        "sensitivity": sensitivity,
        "errors": charts.error_figures(sensitivity),
        "cost": cost_map(sensitivity) if sensitivity.tensors else None,
        "coverage": {
            "picture": charts.coverage_picture(sensitivity), "legend": charts.coverage_legend(), "columns": COLUMNS,
            "rows": coverage_rows(sensitivity.coverage),
        } if sensitivity.coverage else None,
    }  # fmt: skip


__all__ = ["Extras", "Sample", "plan_reasons", "render_html", "require_same_models", "samples_of", "write_html"]
