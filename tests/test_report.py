"""The HTML report: the numbers of the JSON, nothing from outside, nothing injected, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import browser
import pytest
import tiny

from quantkit.analysis.coverage import Coverage
from quantkit.analysis.sensitivity import FormatCost, Sensitivity, TensorSensitivity
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluation.board import Table
from quantkit.evaluation.breakdown import Breakdown, Group, WorstToken
from quantkit.evaluation.compare import Candidate, Report, compare
from quantkit.evaluation.lm_eval.results import EvalReport, Item, ModelScores, Score, TaskScores
from quantkit.evaluation.report.charts import is_stock, short_names
from quantkit.evaluation.report.page import DATA, Extras, Sample, render_html, write_html
from quantkit.evaluation.report.plan import plan_map, plan_maps
from quantkit.evaluation.report.sections import HEADLINE, side_by_side
from quantkit.evaluation.report.svg import Axis, Box, place_labels
from quantkit.evaluation.report.tasks import task_rows
from quantkit.evaluation.texts import default_texts
from quantkit.metrics import Divergence
from quantkit.planning.standard import uniform_plan
from quantkit.planning.sweep import Point, Sweep
from quantkit.quantizer.pipeline import run

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)


class Page(HTMLParser):
    """What the headline table says, by candidate and column; the embedded document; all tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[dict[str, str]] = []
        self.document, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self._inside = tag == "script" and found.get("type") == "application/json"
        if tag == "tr":
            self.rows.append({})
        if tag == "td" and "data-key" in found:
            self.rows[-1][found["data-key"]] = found["data-value"]

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        self.document += data if self._inside else ""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    """A comparison of the shipped mixture of experts."""
    folder, checkpoint = tmp_path_factory.mktemp("report"), open_checkpoint(tiny.MOE)
    for name in ("Q8_0", "Q2_K"):
        run(checkpoint, uniform_plan(checkpoint, name, None), folder / f"{name}.gguf")
    return compare(tiny.MOE, [folder / "Q8_0.gguf", folder / "Q2_K.gguf"], default_texts(), limit=1024)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    """Its report as a file, with texts side by side."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    extras = Extras(
        samples=[Sample("Once", {"original": " there was a dog.", "Q2_K.gguf": " there was a cat."})],
        command="quantkit compare …",
    )
    path.write_text(render_html(report, extras=extras), encoding="utf-8")
    return path


def test_the_page_says_what_the_document_says(report, page):
    found = Page(page.read_text())
    assert json.loads(found.document) == json.loads(report.to_json())
    rows = [row for row in found.rows if "mean_kld" in row]
    assert len(rows) == 2
    for row, candidate in zip(rows, report.candidates, strict=True):
        for key in ("mean_kld", "p999_kld", "perplexity_ratio", "top1_agreement"):
            assert float(row[key]) == pytest.approx(getattr(candidate.divergence, key), rel=1e-6), key


def test_nothing_comes_from_outside_and_the_page_is_small(page):
    found = Page(page.read_text())
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img") or str(attributes.get("src", "data:")).startswith("data:")
        assert "src" not in attributes or str(attributes["src"]).startswith("data:")
        assert not str(attributes.get("href") or "#").startswith(("http", "//"))
    assert page.stat().st_size < 3_000_000
    assert [tag for tag, _ in found.tags].count("h1") == 1 and ("main" in {tag for tag, _ in found.tags})
    assert not re.search(r"url\((?!#|data:)|@import", page.read_text())


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_a_complaint(page, dark):
    shown = browser.show(page, dark=dark)
    assert shown.console == []
    assert shown.dom.count("<button") >= 4  # its script ran: the heads of the table sort


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_does_not_scroll_sideways(page, width):
    assert browser.ask(page, "page.documentElement.scrollWidth", width) <= width


GOOD = {"tokens": 1000, "median_kld": 0.001, "p99_kld": 0.1, "p999_kld": 0.3, "max_kld": 1.5, "perplexity": 9.0,
        "reference_perplexity": 8.8, "perplexity_ratio": 1.0227, "perplexity_ratio_error": 0.002, "top1_error": 0.004}  # fmt: skip
PLAN = {
    "token_embd.weight": "Q6_K",
    "blk.0.attn_q.weight": "Q4_K",
    "blk.1.attn_q.weight": "IQ2_S",
    "blk.1.ffn_down.weight": "Q8_0",
}


def made(name: str, kld: float, size: int, predicted: float | None = None, word: str = "dog") -> Candidate:
    """A candidate that nothing was run for."""
    group = Group("a", 500, kld, kld / 10, 0.5, 0.9)
    groups = [group, replace(group, name="b", mean_kld=kld / 3)]
    worst = [WorstToken(kld=9 * kld, text="t.txt", context=f"the {word}\n", following=word, original_guess=word,
                        original_chance=0.5, candidate_guess="\t", candidate_chance=0.25)]  # fmt: skip
    return Candidate(
        name, size, 4.25, Divergence(mean_kld=kld, mean_kld_error=kld / 50, top1_agreement=0.953, **GOOD), predicted, dict(PLAN),
        breakdown=Breakdown(groups, groups, groups, groups, groups, worst),
    )  # fmt: skip


def made_report(*candidates: Candidate, reference: str = "m") -> Report:
    return Report(reference, 10_000_000, "llama", "torch", ["t.txt"], 1000, 512, list(candidates), {"torch": "2"})


def answered(*models: tuple[str, list[bool]], asked: str = "what?") -> EvalReport:
    """Models that answered the same questions of a task in a group, in words that hold their names."""
    found = []
    for name, right in models:
        items = tuple(
            Item(n, f"h{n}", {"acc": float(yes)}, question=asked, expected=f"right {asked}", said={"acc": f"said {name}"})
            for n, yes in enumerate(right)
        )
        share = (Score("acc", sum(right) / len(right), 0.01, "share", True),)
        results = {
            "one": TaskScores("one", 0, "1", len(right), share, items),
            "all": TaskScores("all", 0, "1", len(right), share, (), ("one",)),
        }
        found.append(ModelScores(name, name, "torch", name, 1000 * len(name), 512, 0, 1.0, results))
    return EvalReport(("all",), tuple(found))


def analyzed_by_hand(model: str = "m", tensor: str = "blk.0.attn_q.weight") -> Sensitivity:
    costs = {"Q4_K": FormatCost(0.01, 0.005, 0.001, predicted_kld=0.002)}
    tensors = {
        name: TensorSensitivity("attn_q", layer, (64, 64), 3.0, 0, dict(costs), int8_activation_error=1e-4)
        for layer, name in enumerate((tensor, "blk.1.attn_q.weight"))
    }
    coverage = Coverage(0, 1000, 64, [3, 500], [0.2, 0.5], [40, 0], [21, 0], [0.1, 0.0]).to_json()
    weight = {"tensor": tensor, "layer": 0, "row": 5, "column": 488, "value": 0.75}
    return Sensitivity(model, "llama", "id", "probes", {}, tensors, [weight], coverage=[coverage])


def swept() -> Sweep:
    points = [Point(n, kind, size, 4.0, kld, {}) for n, kind, size, kld in
              (("p", "dynamic", 3_000_000, 0.2), ("q", "dynamic", 6_000_000, 0.01), ("Q4_K_M", "stock", 5_000_000, 0.05))]  # fmt: skip
    return Sweep("m", "probes", points)


def test_every_number_of_the_headline_is_rounded_from_the_document():
    report = made_report(made("m-dynamic-Q4_K_M.gguf", 0.0123456789, 5_000_000, 0.01), made("m-Q2_K.gguf", 0.3, 3_000_000))
    text = render_html(report)
    for candidate, row in zip(report.candidates, [row for row in Page(text).rows if "mean_kld" in row], strict=True):
        exact = {**vars(candidate.divergence), **vars(candidate)}
        assert {key: json.loads(value) for key, value in row.items()} == {key: exact[key] for key in row}
        assert set(row) == {key for key, _ in HEADLINE}
    cells = re.findall(r'data-key="(\w+)" data-value="[^"]*">([^<]*)<?(?:small>([^<]*))?', text)
    assert ("mean_kld", "0.01235 ", "± 0.00025") in cells and ("file_bytes", "5,000,000", "") in cells
    assert ("top1_agreement", "95.30 % ", "± 0.40 %") in cells and ("predicted_kld", "–", "") in cells
    shown = [float(v) for v in re.findall(r'data-axis="text" data-value="([^"]+)"', text)]
    assert shown == [g.mean_kld for g in zip(*(c.breakdown.text for c in report.candidates), strict=True) for g in g]


def test_hostile_words_stay_words_wherever_they_come_from():
    report = made_report(made(HOSTILE, 0.1, 5_000_000, 0.1, word=HOSTILE), made("b", 0.2, 4_000_000), reference=HOSTILE)
    report.texts, report.versions = [HOSTILE], {HOSTILE: HOSTILE}
    report.candidates[0].plan[f"blk.0.{HOSTILE}"] = "Q4_K"
    extras = Extras(
        reasons=[dict.fromkeys(PLAN, HOSTILE), {}], sweep=swept(), samples=[Sample(HOSTILE, {HOSTILE: HOSTILE, "b": "x"})],
        results=answered((HOSTILE, [True, False]), ("b", [False, False]), asked=HOSTILE), board=[Table(HOSTILE, ("a", "b"), ((HOSTILE, HOSTILE),))],
        hardware=HOSTILE, command=HOSTILE,
    )  # fmt: skip
    found = Page(render_html(report, analyzed_by_hand(HOSTILE, f"blk.0.{HOSTILE}"), extras))
    assert not {"img", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert json.loads(found.document) == json.loads(report.to_json())


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(theme):
    colours = {
        name: pair.split(", ")[theme]
        for name, pair in re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", (DATA / "report.css").read_text())
    }
    for ink in ("ink", "dim", "accent"):
        assert contrast(colours[ink], colours["paper"]) >= 4.5, ink
    assert contrast(colours["ink"], colours["mark"]) >= 4.5 and contrast(colours["dim"], colours["bar"]) >= 4.5
    for step in range(8):
        assert contrast(colours[f"t{step}"], colours[f"b{step}"]) >= 4.5, step
    for series in range(5):
        assert contrast(colours[f"s{series}"], colours["paper"]) >= 3, series


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's ratio of two colours (#rrggbb)."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_cell_of_the_plan_has_its_format_and_its_reason():
    text = render_html(
        made_report(made("m", 0.1, 5_000_000)), extras=Extras(reasons=[{"blk.1.attn_q.weight": "it hurts little"}])
    )
    cell = re.search(r'<td class="b1" tabindex="0">IQ2_S<span class="tip">(.*?)</span></td>', text)[1]
    assert "blk.1.attn_q.weight: IQ2_S, 2.56 bits per weight" in cell and "it hurts little" in cell
    assert '<td class="b5" tabindex="0" colspan="2">Q6_K' in text  # the embedding belongs to no layer


def test_plans_of_many_candidates_lose_their_reasons_before_they_are_left_out():
    candidates = [made(str(n), 0.1, 5_000_000) for n in range(3)]
    reasons = [dict.fromkeys(PLAN, "x" * 500)] * 3
    whole, plain, none = plan_maps(
        candidates, reasons, room=plan_map(candidates[0], reasons[0]).room + plan_map(candidates[1]).room
    )
    assert whole.rows[0][1][0].why and not whole.note
    assert plain.rows and not plain.rows[0][1][0].why and "left out" in plain.note
    assert not none.rows and "left out" in none.note.lower()


def test_a_large_model_with_many_candidates_stays_under_three_megabytes():
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    plan = {f"blk.{n}.{role}.weight": "Q4_K" for n in range(80) for role in roles}
    candidates = [made(str(n), 0.1 + n, 5_000_000 + n) for n in range(12)]
    for candidate in candidates:
        candidate.plan = plan
    reasons = [dict.fromkeys(plan, "0.5 % of the predicted KLD; Q5_0 would save 0 bytes and add 5.1e-06 nats/token" * 2)] * 12
    assert len(render_html(made_report(*candidates), extras=Extras(reasons=reasons)).encode()) < 3_000_000


def test_tasks_show_flips_and_the_chance_of_them():
    results = answered(("original", [True] * 8 + [False] * 2), ("small", [False] * 6 + [True] * 3 + [False]))
    (row,) = task_rows(results)
    assert row.task == "all" and row.cells[0].change is None
    change = row.cells[1].change.flips
    assert (change.lost, change.gained) == (6, 1) and change.p_value == pytest.approx(0.125)
    text = render_html(made_report(made("m", 0.1, 5)), extras=Extras(results=results))
    assert text.count("6 lost, 1 gained, p 0.125 (Holm 0.125)") == 2  # of the group, and of its only task
    assert "30.00 ± 1.00 %" in text and "−50.00" in text
    assert "no answer changed" in render_html(
        made_report(made("m", 0.1, 5)), extras=Extras(results=answered(("original", [True]), ("same", [True])))
    )


def test_answers_that_flipped_are_listed_where_keys_reach_them():
    results = answered(("original", [True] * 12 + [False] * 2), ("small", [False] * 12 + [True, False]), asked="why < not")
    text = render_html(made_report(made("m", 0.1, 5)), extras=Extras(results=results))
    (opened,) = re.findall(r"<details><summary>all, small.*?</details>", text, re.DOTALL)
    assert "12 lost, 1 gained by acc</small></summary>" in opened and "8 of 12" in opened
    assert (
        opened.count("why &lt; not</span>") == 9
        and opened.count("<q>said small</q>") == opened.count("<q>said original</q>") == 9
    )
    assert opened.count("<q>right why &lt; not</q>") == 9 and "one 7</span>" in opened and "one 8<" not in opened
    same = answered(("original", [True, False]), ("same", [True, False]))
    assert "<details><summary>all, same" not in render_html(made_report(made("m", 0.1, 5)), extras=Extras(results=same))


def with_tasks(results: EvalReport, **tasks: tuple[TaskScores, ...]) -> EvalReport:
    """Results with more tasks: of each, one for every model."""
    models = [
        replace(model, results=model.results | {name: found[n] for name, found in tasks.items()})
        for n, model in enumerate(results.models)
    ]
    return replace(results, tasks=(*results.tasks, *tasks), models=tuple(models))


def test_perplexities_and_several_answers_stand_beside_the_original():
    def text_of(*scores: float) -> TaskScores:
        items = tuple(Item(n, f"t{n}", {"word_perplexity": (score, 10.0)}, (score,)) for n, score in enumerate(scores))
        value = math.exp(-sum(scores) / 10 / len(scores))
        return TaskScores("texts", 0, "1", len(scores), (Score("word_perplexity", value, 0.1, "per word", False),), items)

    def sampled(*rights: int) -> TaskScores:
        items = tuple(Item(n, f"s{n}", {"pass@1": right / 4}, samples=4) for n, right in enumerate(rights))
        return TaskScores("sums", 0, "1", len(rights), (Score("pass@1", sum(rights) / 8, 0.1, "share", True),), items)

    results = with_tasks(
        answered(("o", [True]), ("x", [True])),
        texts=(text_of(-20.0, -30.0), text_of(-21.0, -33.0)), sums=(sampled(4, 2), sampled(3, 2)),
    )  # fmt: skip
    results = replace(results, samples=4, temperature=0.7)
    rows = {row.task: row for row in task_rows(results)}
    assert rows["texts"].cells[1].moved.startswith("×1.2214 (0.34")  # exp(4 ÷ 20); Student's 12.7 of one degree of freedom
    assert rows["sums"].cells[1].moved.startswith("−12.50 (") and rows["sums"].cells[1].flipped == ""
    assert not rows["texts"].cells[0].moved and not rows["sums"].cells[1].listed
    text = render_html(made_report(made("m", 0.1, 5)), extras=Extras(results=results))
    assert "×1.2214" in text and "4 were drawn to each question at temperature 0.7" in text


def test_many_tasks_with_long_answers_stay_under_three_megabytes():
    """Twelve candidates lost every question of 60 tasks; each sign of the words needs five in HTML."""
    words = "&" * 200
    names = ["original", *(f"candidate {n}" for n in range(12))]

    def task(name: str, right: float) -> TaskScores:
        items = tuple(
            Item(n, f"{name}{n}", {"acc": right}, question=words, expected=words[:160], said={"acc": words[:160]})
            for n in range(9)
        )
        return TaskScores(name, 0, "1", 9, (Score("acc", right, 0.1, "share", True),), items)

    tasks = {f"task{n}": tuple(task(f"task{n}", float(model == 0)) for model in range(13)) for n in range(60)}
    results = with_tasks(answered(*((name, [True]) for name in names)), **tasks)
    text = render_html(made_report(made("m", 0.1, 5)), extras=Extras(results=results))
    assert 200 <= text.count('<p class="said">') <= 400 and len(text.encode()) < 3_000_000


def test_the_first_word_that_differs_is_marked():
    (shown,) = side_by_side(
        [Sample("p", {"o": "the big dog ran", "a": "the big door ran", "b": "the big dog ran", "c": "the big"})]
    )
    assert [(r["same"], r["first"], r["rest"], r["at"]) for r in shown["rows"]] == [
        ("the big ", "door", " ran", 10), ("the big dog ran", "", "", None), ("the ", "big", "", 7),
    ]  # fmt: skip
    text = render_html(made_report(made("m", 0.1, 5)), extras=Extras(samples=[Sample("p", {"o": "a b", "x": "a c"})]))
    assert '<span class="same">a </span><mark>c</mark>' in text and "departs after 2 characters" in text


def test_everything_that_was_found_out_is_shown():
    report = made_report(made("m-dynamic-Q4_K_M.gguf", 0.01, 5_000_000, 0.012), made("m-Q4_K_M.gguf", 0.03, 5_000_000))
    extras = Extras(
        sweep=swept(), board=[Table("kept rows", ("a", "b"), (("c", "d"),))], hardware="a machine", command="a command"
    )
    text = html.unescape(render_html(report, analyzed_by_hand(), extras))
    for words in ("plans at every size", "llama-quantize's own mix", "Predicted against measured", "Error of the weights", "in INT8",
                  "488", "Before and after", "kept rows", "a machine", "a command"):  # fmt: skip
        assert words in text, words
    assert text.count('role="img"') == text.count("aria-label", 0) - len(
        re.findall(r'aria-label(?!="[^"]*" class="chart")', text)
    )
    pictures = [attributes for tag, attributes in Page(text).tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) >= 6 and all(picture["aria-label"] for picture in pictures)


@pytest.mark.parametrize("klds", [(0.0,), (0.0, 0.1), (1e-9, 5.0), (0.1, 0.1), (math.nan, 0.1), ()])
def test_odd_numbers_can_be_drawn(klds):
    text = render_html(made_report(*[made(f"m-{n}", kld, 5_000_000, kld) for n, kld in enumerate(klds)]))
    assert not [v for v in re.findall(r'(?:transform|d|x|y)="([^"]*)"', text) if "nan" in v or "inf" in v]


def test_names_tell_stock_mixes_from_our_plans():
    assert is_stock(made("m-Q4_K_M.gguf", 0.1, 5)) and is_stock(made("m-stock-x.gguf", 0.1, 5, 0.1))
    assert not is_stock(made("m-dynamic-3.50bpw-Q3_K_M.gguf", 0.1, 5)) and not is_stock(made("m-Q4_K_M.gguf", 0.1, 5, 0.1))
    assert not is_stock(made("Q4_K_Mine", 0.1, 5))
    assert short_names(["m-7b-Q4_K_M.gguf", "m-7b-dynamic-Q2_K.gguf"]) == ["Q4_K_M", "dynamic-Q2_K"]
    assert short_names(["m.gguf"]) == ["m"] and short_names(["a/m.gguf", "a/m.gguf"]) == ["a/m.gguf", "a/m.gguf"]


def test_labels_keep_out_of_each_others_way():
    places = [(100.0, 100.0, "alpha"), (104.0, 101.0, "beta"), (108.0, 99.0, "gamma")]
    words = [str(label) for label in place_labels(places, Box(0, 0, 300, 200))]
    assert len(words) == 3
    assert len({re.search(r'x="([\d.]+)" y="([\d.]+)"', label).groups() for label in words}) == 3
    assert place_labels(places, Box(90, 90, 120, 110)) == []  # no room: the marks keep their titles


def test_ticks_are_round_and_within_the_axis():
    assert Axis(0.003, 0.2, 0, 100, log=True).ticks() == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    assert Axis(1e-6, 10, 0, 100, log=True).ticks() == pytest.approx([10.0**e for e in (-6, -4, -2, 0)])
    assert Axis(4.6, 7.3, 0, 100).ticks() == [5, 5.5, 6, 6.5, 7]
    assert [Axis(1, 100, 0, 50, log=True).at(value) for value in (1, 10, 1000, 0.1)] == [0, 25, 50, 0]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report with every section."""
    path = tmp_path_factory.mktemp("full") / "report.html"
    report = made_report(made("m-Q4_K_M.gguf", 0.03, 5_000_000), made("m-dynamic-Q4_K_M.gguf", 0.01, 5_000_100, 0.012))
    extras = Extras(
        reasons=[{}, dict.fromkeys(PLAN, "because")], sweep=swept(), results=answered(("o" * 60, [True, True]), ("x" * 60, [True, False])),
        samples=[Sample("p" * 90, {"o": "a" * 90, "x": "b" * 90})], board=[Table("t", ("a", "b"), (("c" * 60, "d" * 60),))],
        command="c" * 300,
    )  # fmt: skip
    write_html(report, path, analyzed_by_hand(), extras)
    return path


@needs_browser
def test_every_section_fits_a_phone_without_a_complaint(full):
    assert browser.show(full).console == []
    opened = "(page.querySelectorAll('details').forEach((one) => (one.open = true)), page.documentElement.scrollWidth)"
    assert browser.ask(full, opened, 360) <= 360


@needs_browser
def test_what_a_browser_shows_are_the_numbers_of_the_document(full):
    document = json.loads(Page(full.read_text()).document)
    shown = browser.ask(full, "[...page.querySelectorAll('.headline td')].map((cell) => [cell.dataset.key, cell.innerText])")
    klds = [float(words.split()[0]) for key, words in shown if key == "mean_kld"]
    assert klds == [round(c["divergence"]["mean_kld"], 5) for c in document["candidates"]]


@needs_browser
def test_heads_sort_and_say_so(full):
    clicks = "const head = page.querySelectorAll('.headline th')[1]; head.firstChild.click();"
    first = "page.querySelector('.headline tbody th').innerText"
    script = (
        f"(() => {{ {clicks} const a = {first}; {clicks.split(';')[1]}; return [a, {first}, head.getAttribute('aria-sort')] }})()"
    )
    assert browser.ask(full, script) == ["m-dynamic-Q4_K_M.gguf", "m-Q4_K_M.gguf", "descending"]


@needs_browser
def test_arrow_keys_move_in_a_plan_and_the_reason_is_shown(full):
    script = """(() => {
      const map = page.querySelectorAll('.map')[1], cell = map.querySelector('td[tabindex="0"]');
      cell.focus();
      const tip = page.activeElement.querySelector('.tip'), shown = view.getComputedStyle(tip).display;
      cell.dispatchEvent(new view.KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
      return [shown, tip.innerText, page.activeElement.firstChild.data, map.querySelectorAll('td[tabindex="0"]').length];
    })()"""
    shown, reason, after, stops = browser.ask(full, script)
    assert (shown, after, stops) == ("block", "IQ2_S", 1) and "because" in reason


@needs_browser
def test_the_switch_overrules_the_system(full):
    paper = "view.getComputedStyle(page.body).backgroundColor"
    assert browser.ask(full, paper) == "rgb(255, 255, 255)" and browser.ask(full, paper, dark=True) == "rgb(15, 19, 24)"
    assert browser.ask(full, f"(page.getElementById('theme-light').click(), {paper})", dark=True) == "rgb(255, 255, 255)"
    assert browser.ask(full, f"(page.getElementById('theme-dark').click(), {paper})") == "rgb(15, 19, 24)"


@needs_browser
def test_the_policy_stops_scripts_and_requests_that_are_not_the_reports(full, tmp_path):
    path = tmp_path / "injected.html"
    more = "<script>document.title = 'taken'</script><img src='http://example.com/x.png'></body>"
    path.write_text(full.read_text().replace("</body>", more))
    shown = browser.show(path)
    assert "<title>taken" not in shown.dom and len(shown.console) >= 2
