"""The HTML report by keyboard alone, and for eyes that see no or little colour: in a browser that gets real keys."""

from __future__ import annotations

import json

import browser
import pytest
from test_report import PLAN, analyzed_by_hand, answered, contrast, made, made_report, swept

from quantkit.evaluation.board import Table
from quantkit.evaluation.report.page import Extras, Sample, write_html

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
COLOURS = """
  const parts = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
  const behind = (node) => {
    const found = [];
    for (let at = node; at; at = at.parentElement) found.push(parts(getComputedStyle(at).backgroundColor));
    return found.reverse().reduce((under, colour) => over(colour, under), [255, 255, 255]);
  };
  const seen = (node, colour, more = 1) => {
    const [r, g, b, a] = parts(colour);
    let shown = a * more;
    for (let at = node; at; at = at.parentElement) shown *= Number(getComputedStyle(at).opacity);
    return over([r, g, b, shown], behind(node));
  };
  const hex = (colour) => '#' + colour.map((v) => Math.round(v).toString(16).padStart(2, '0')).join('');
"""
# what has the focus: its name, the ring around it as [style, pixels, colour, colour of the paper], and how far it is cut off
STOP = f"""(() => {{ {COLOURS}
  const at = document.activeElement, label = at.getAttribute('aria-label') || at.id || at.textContent.trim().slice(0, 40);
  const ringed = at.matches('input') ? at.nextElementSibling : at, style = getComputedStyle(ringed), box = ringed.getBoundingClientRect();
  const reach = parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset);
  let cut = 0;
  for (let up = ringed.parentElement; up && up !== document.body; up = up.parentElement) {{
    if (getComputedStyle(up).overflowX === 'visible') continue;
    const room = up.getBoundingClientRect();
    cut = Math.max(cut, room.left - (box.left - reach), box.right + reach - room.right, room.top - (box.top - reach), box.bottom + reach - room.bottom);
  }}
  const paper = behind(ringed.parentElement);
  return [at.tagName, label, [style.outlineStyle, parseFloat(style.outlineWidth), hex(over(parts(style.outlineColor), paper)), hex(paper)], cut];
}})()"""
TIP = """(() => {
  const cell = document.activeElement, tip = cell.querySelector('.tip'), box = tip.getBoundingClientRect();
  const there = document.elementFromPoint(box.left + 30, box.top + 12);
  const whole = box.top >= -1 && box.bottom <= innerHeight + 1 && cell.getBoundingClientRect().top >= -1;
  const free = !(there && cell.getBoundingClientRect().bottom > box.top && cell.getBoundingClientRect().top < box.bottom);
  return [cell.firstChild.data, tip.innerText, Boolean(there && tip.contains(there)) && whole && free];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every section."""
    path = tmp_path_factory.mktemp("keyboard") / "report.html"
    report = made_report(made("m-Q4_K_M.gguf", 0.03, 5_000_000), made("m-dynamic-Q4_K_M.gguf", 0.01, 5_000_100, 0.012))
    extras = Extras(
        reasons=[dict.fromkeys(PLAN, "since it is small"), dict.fromkeys(PLAN, "because")], sweep=swept(),
        results=answered(("original", [True, True]), ("m-Q4_K_M.gguf", [True, False])),
        samples=[Sample("Once", {"original": "a dog ran", "m-Q4_K_M.gguf": "a dog sat"})], board=[Table("t", ("a", "b"), (("c", "d"),))],
        hardware="a machine", command="quantkit compare …",
    )  # fmt: skip
    write_html(report, path, analyzed_by_hand(), extras)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_tab_reaches_every_part_and_shows_where_it_is(page, dark):
    with browser.window(page, dark=dark) as shown:
        stops = []
        for _ in range(200):
            shown.press("Tab")
            if (stop := shown.ask(STOP))[0] == "BODY":
                break
            stops.append(stop)
        assert stop[0] == "BODY"  # it ends: nothing holds the focus
        wanted = shown.ask(
            "[...document.querySelectorAll('a, summary, button, [role=region], pre')].filter((e) => e.checkVisibility()).length"
        )
        maps = shown.ask("document.querySelectorAll('.map').length")
    assert len(stops) == wanted + maps + 1 and maps == 3  # a map is one stop, and so are the three colour schemes
    for tag, label, (style, width, colour, paper), cut in stops:
        assert style == "solid" and width >= 2 and contrast(colour, paper) >= 3, (tag, label)
        assert cut <= 0, f"{tag} {label}: {cut} pixels of its ring are cut off"


def test_a_table_is_sorted_by_keyboard(page):
    say = "[document.activeElement.parentNode.getAttribute('aria-sort'), ...[...document.querySelectorAll('.headline')[0].tBodies[0].rows].map((r) => r.cells[0].innerText)]"
    first, second = "m-dynamic-Q4_K_M.gguf", "m-Q4_K_M.gguf"
    with browser.window(page) as shown:
        shown.tab_to(".headline th:nth-child(2) button")
        assert shown.ask(say) == [None, second, first]
        shown.press("Enter")
        assert shown.ask(say) == ["ascending", first, second]
        shown.press(" ")
        assert shown.ask(say) == ["descending", second, first]
        shown.press("Tab")
        assert shown.ask("document.activeElement.textContent") == "bytes"


def test_details_open_and_close_by_keyboard(page):
    with browser.window(page) as shown:
        shown.tab_to("#numbers summary")
        opened = []
        for key in ("Enter", " ", "Enter"):
            shown.press(key)
            opened.append(shown.ask("document.activeElement.parentNode.open"))
        assert opened == [True, False, True]
        shown.press("Tab")
        assert shown.ask("document.activeElement.closest('details').querySelector('table').checkVisibility()")
        assert shown.ask("document.activeElement.getAttribute('aria-label')") == "KL divergence against size"


def test_the_switch_of_colours_takes_arrows(page):
    with browser.window(page) as shown:
        shown.tab_to("#theme-auto")
        shown.press("ArrowRight", 2)
        assert shown.ask("[document.activeElement.id, getComputedStyle(document.body).colorScheme]") == ["theme-dark", "dark"]


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (1200, 400), (360, 640)])
def test_every_cell_of_a_map_is_reached_by_arrows_and_says_its_reason(page, width, height):
    with browser.window(page, width, height) as shown:
        shown.tab_to("#plans figure:first-child td")
        cells = shown.ask("document.activeElement.closest('table').querySelectorAll('td[tabindex]').length")
        found, todo = {}, [[]]
        while todo:  # every way from the first cell, by keys alone
            way = todo.pop(0)
            shown.ask("document.querySelector('.map td[tabindex]').focus()")
            for key in way:
                shown.press(key)
            words, reason, visible = shown.ask(TIP)
            if reason in found:
                continue
            found[reason] = words
            assert visible, f"the reason of {words} cannot be seen"
            assert "since it is small" in reason and words in reason
            todo += [[*way, key] for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")]
        assert len(found) == cells == len(PLAN)
        shown.ask("document.querySelector('.map td[tabindex]').focus()")
        assert shown.ask("[...document.querySelectorAll('.tip')].filter((tip) => tip.checkVisibility()).length") == 1


@pytest.mark.parametrize("height", [420, 260])
def test_the_reason_is_in_view_with_its_cell_where_the_window_is_low(height, tmp_path):
    roles = (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
        "ffn_gate_inp",
        "attn_norm",
        "ffn_norm",
    )
    candidate = made("m.gguf", 0.03, 5_000_000)
    candidate.plan = {f"blk.0.{role}.weight": "Q4_K" for role in roles}
    write_html(made_report(candidate), tmp_path / "tall.html", extras=Extras(reasons=[dict.fromkeys(candidate.plan, "because")]))
    with browser.window(tmp_path / "tall.html", height=height) as shown:
        shown.tab_to(".map td")
        for _ in roles:
            words, reason, visible = shown.ask(TIP)
            assert visible and words == "Q4_K" and "because" in reason, reason
            shown.press("ArrowDown")


def test_what_hovering_tells_of_a_group_stands_in_a_table_too(page):
    with browser.window(page) as shown:
        said = shown.ask("[...document.querySelectorAll('#where td[title]')].map((cell) => cell.title.match(/[\\d.]+ %/g))")
        shown.tab_to("#where summary")
        shown.press("Enter")
        table = "[...document.activeElement.parentNode.querySelectorAll('tbody tr')].map((row) => [...row.cells].slice(1).map((c) => c.innerText))"
        rows = shown.ask(table)
        assert shown.ask("document.activeElement.parentNode.querySelector('table').checkVisibility()")
    assert [cell for row in rows for cell in row] == [words for cell in said[: 2 * len(rows)] for words in cell]


def test_colour_is_never_alone(page):
    with browser.window(page) as shown:
        marks = shown.ask("""[...document.querySelectorAll('svg.chart')].map((chart) => [...chart.querySelectorAll('.mark')].map((mark) =>
            [getComputedStyle(mark).getPropertyValue('--c'), mark.getAttribute('d') + mark.classList.contains('hollow')]))""")
        cells = shown.ask("[...document.querySelectorAll('td[class^=b]')].map((cell) => cell.firstChild.data.trim())")
        steps = shown.ask("[...document.querySelectorAll('.steps li')].map((step) => step.innerText.trim())")
        marked = shown.ask("[...document.querySelectorAll('mark')].map((mark) => getComputedStyle(mark).textDecorationLine)")
        weights = shown.ask("[...document.querySelectorAll('.theme span')].map((label) => getComputedStyle(label).fontWeight)")
        links = shown.ask("[...document.querySelectorAll('p a:not(.skip)')].map((a) => getComputedStyle(a).textDecorationLine)")
        signs = shown.ask("[...document.querySelectorAll('.sortable button')].map((b) => getComputedStyle(b, '::after').content)")
    assert sum(map(bool, marks)) >= 4
    for chart in marks:
        assert len({shape for _, shape in chart}) >= len({colour for colour, _ in chart})
        assert all(len({colour for colour, other in chart if other == shape}) == 1 for _, shape in chart)
    assert len(cells) >= 2 * len(PLAN) and all(cells) and steps and all(steps)
    assert marked and set(marked) == {"underline"} and set(links) <= {"underline"} and all(sign != "none" for sign in signs)
    assert len(set(weights)) == 2  # the chosen scheme is not only darker


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_contrast(page, dark):
    script = f"""(() => {{ {COLOURS}
      document.querySelectorAll('details').forEach((one) => (one.open = true));
      const out = {{}}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const add = (where, colour, under) => (out[where + ' ' + hex(colour) + ' ' + hex(under)] = [where, hex(colour), hex(under)]);
      for (let text; (text = walker.nextNode()); ) {{
        const at = text.parentElement, style = getComputedStyle(at);
        if (!text.data.trim() || !at.checkVisibility() || at.closest('.hidden, script, title')) continue;
        add(at.tagName + '.' + at.className, seen(at, at.closest('svg') ? style.fill : style.color), behind(at));
      }}
      for (const at of document.querySelectorAll('.sortable button')) {{
        const style = getComputedStyle(at, '::after');
        add('sign', seen(at, style.color, Number(style.opacity)), behind(at));
      }}
      return Object.values(out);
    }})()"""
    with browser.window(page, dark=dark) as shown:
        found = shown.ask(script)
    kinds = {where.split(".")[0] for where, _, _ in found}
    assert kinds >= {"H1", "P", "TH", "TD", "SMALL", "A", "SPAN", "LI", "MARK", "SUMMARY", "text", "PRE", "Q", "BUTTON", "sign"}
    low = {where: round(contrast(colour, paper), 2) for where, colour, paper in found if contrast(colour, paper) < 4.5}
    assert not low, json.dumps(low)
