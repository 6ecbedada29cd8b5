"""The leaderboard: rows add up across runs, only like is ranked with like, nobody's rows are lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.api import compare
from quantkit.errors import CheckpointError, OutputError, QuantkitError
from quantkit.evaluation import board as boards
from quantkit.evaluation.board import (
    Board,
    Hardware,
    Row,
    append,
    read_board,
    render,
    require_board,
    rows_of,
    to_markdown,
)
from quantkit.evaluation.texts import default_texts
from quantkit.metrics import Divergence
from quantkit.quantizer.manifest import Manifest, manifest_path

LIMIT = 512


def row(name: str = "a.gguf", kld: float = 0.01, size: int = 1000, **changes) -> Row:
    divergence = Divergence(255, kld, 0.001, 0.005, 0.1, 0.2, 0.3, 20.0, 19.0, 1.05, 0.01, 0.9, 0.02)
    made = Row(
        reference="model", reference_identity="r" * 16, reference_bytes=5000, architecture="llama", texts=("wiki.txt",),
        text_identity="t" * 64, window=512, tokens=255, runtime="torch", device="cpu", name=name, identity=name, sha256=None,
        file_bytes=size, bpw=4.5, divergence=divergence, estimate_error=0.0, predicted_kld=None,
        versions={"quantkit-llm": "0.1.0"}, commit="abc1234", hardware=Hardware("a processor, 2 cores", None), date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def made(tiny_folder, tiny_gguf):
    """(original, candidates, report, rows) of a real comparison."""
    original, files = tiny_folder("llama"), [tiny_gguf("llama", "Q8_0"), tiny_gguf("llama", "Q4_0")]
    report = compare(original, files, limit=LIMIT)
    return original, files, report, rows_of(report)


def test_a_comparison_becomes_rows_with_its_numbers_and_where_they_come_from(made):
    _, files, report, rows = made
    assert [r.name for r in rows] == [f.name for f in files]
    for r, candidate, file in zip(rows, report.candidates, files, strict=True):
        assert r.divergence == candidate.divergence and r.tokens == report.tokens > 0
        assert (r.file_bytes, r.bpw) == (file.stat().st_size, candidate.bpw)
        assert r.sha256 == Manifest.read(manifest_path(file)).file_sha256
        assert (r.runtime, r.device, r.hardware.gpu) == ("torch", "cpu", None) and "cores" in r.hardware.machine
        assert "quantkit-llm" in r.versions and r.date[:2] == "20"
    assert rows[0].identity != rows[1].identity and rows[0].setting == rows[1].setting


def test_a_board_reads_back_as_it_was_written(made, tmp_path):
    rows = made[-1]
    written = append(tmp_path / "board.json", rows)
    assert read_board(tmp_path / "board.json") == written == Board(tuple(rows))
    assert json.loads((tmp_path / "board.json").read_text())["quantkit_board"] == 1


def test_the_same_comparison_again_replaces_its_rows_and_another_text_adds_rows(made, tmp_path):
    original, files, _, rows = made
    path = tmp_path / "board.json"
    append(path, rows)
    again = compare(original, files, limit=LIMIT)
    assert append(path, rows_of(again)).rows[0].key == rows[0].key
    assert len(read_board(path).rows) == 2
    other = tmp_path / default_texts()[0].name  # the same name, another text
    other.write_text(default_texts()[0].read_text(encoding="utf-8")[20_000:60_000], encoding="utf-8")
    found = compare(original, files[:1], [other], limit=LIMIT)
    after = append(path, rows_of(found))
    assert len(after.rows) == 3 and [len(group) for group in after.groups()] in ([2, 1], [1, 2])


def test_an_original_kept_in_a_file_is_the_same_original(made, tmp_path):
    original, files, report, rows = made
    compare(original, files[:1], limit=LIMIT, cache=tmp_path / "original.ref")
    kept = compare(tmp_path / "original.ref", files)
    assert (kept.reference_identity, kept.text_identity) == (report.reference_identity, report.text_identity)
    assert [row.key for row in rows_of(kept)] == [row.key for row in rows]


def test_which_fields_decide_whether_a_row_replaces_another():
    known = Board((row(),))
    newer = row(kld=0.5, date="2027-01-01T00:00:00+00:00", commit=None, bpw=9.0)
    assert known.added([newer]).rows == (newer,)
    for change in (
        {"reference_identity": "x"}, {"text_identity": "x"}, {"window": 256}, {"tokens": 1}, {"runtime": "llama"}, {"device": "cuda"},
        {"identity": "x"}, {"file_bytes": 1}, {"sha256": "x"},
    ):  # fmt: skip
        assert len(known.added([row(**change)]).rows) == 2, change


def test_a_replaced_file_with_an_old_manifest_has_no_hash(made, tmp_path):
    source, copy = made[1][0], tmp_path / "other.gguf"
    copy.write_bytes(source.read_bytes())
    manifest_path(copy).write_text(manifest_path(made[1][1]).read_text())
    found = compare(made[0], [copy], limit=LIMIT).candidates[0]
    assert (found.identity, found.sha256) == (made[2].candidates[0].identity, None)


def test_only_like_is_ranked_with_like():
    rows = [
        row("big.gguf", 0.01, 3000), row("small.gguf", 0.02, 1000), row("bad.gguf", 0.03, 2000), row("wrecked.gguf", math.nan, 500),
        row("small.gguf", 0.001, runtime="llama"), row("small.gguf", 0.002, text_identity="u" * 64, texts=("code.txt",)),
        row("small.gguf", 0.003, reference="other", reference_identity="o"),
    ]  # fmt: skip
    groups = Board(tuple(rows)).groups()
    assert sorted(len(group) for group in groups) == [1, 1, 1, 4]
    ranked = max(groups, key=len)
    assert [r.name for r in ranked] == ["big.gguf", "small.gguf", "bad.gguf", "wrecked.gguf"]
    assert [r.name for r in boards.best_for_size(ranked)] == ["small.gguf", "big.gguf"]


def test_the_rows_of_one_original_under_two_names_stand_in_one_table():
    board = Board((row("a.gguf", 0.02), row("b.gguf", 0.01, reference="model-BF16.gguf")))
    assert [[r.name for r in group] for group in board.groups()] == [["b.gguf", "a.gguf"]]


def test_tables_show_the_numbers(made):
    board = Board((*made[-1], row("stranger.gguf")))
    tables = render(board, origin=True)
    assert len(tables) == 2 and all(len(cells) == len(table.columns) for table in tables for cells in table.rows)
    (table,) = render(board, like=made[2])
    assert [cells[0] for cells in table.rows] == [made[1][0].name, made[1][1].name]
    best = made[2].candidates[0].divergence
    assert f"{best.mean_kld:.5f} ± {best.mean_kld_error:.5f}" in table.rows[0] and "255 tokens" in table.title
    assert render(Board()) == []


def test_markdown_keeps_a_hostile_name_in_its_cell():
    name = "x|`<b>*y*\n| z"
    lines = to_markdown(render(Board((row(name),)))[0]).splitlines()
    assert len(lines) == 5 and lines[-1].startswith(r"| x\|\`&lt;b&gt;\*y\* \| z | 1,000 |")


def test_numbers_that_are_not_finite_survive_as_null(tmp_path):
    append(tmp_path / "b.json", [row(kld=math.nan), row("b", math.inf)])
    text = (tmp_path / "b.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert all(math.isnan(r.divergence.mean_kld) for r in read_board(tmp_path / "b.json").rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a board"),
        ("{", "not a board"),
        ("[]", "not a board"),
        ('{"quantkit_report": 1}', "not a board"),
        ('{"quantkit_board": true, "rows": []}', "not a board"),
        ('{"quantkit_board": 2, "rows": []}', "version 2, this quantkit knows 1"),
        ('{"quantkit_board": 1}', "damaged board"),
        ('{"quantkit_board": 1, "rows": [{"name": "x"}]}', "row 1 misses or misnames"),
    ],
)
def test_what_is_no_board_is_refused_and_left_alone(content, words, tmp_path):
    path = tmp_path / "board.json"
    path.write_text(content)
    for attempt in (lambda: read_board(path), lambda: require_board(path), lambda: append(path, [row()])):
        with pytest.raises(CheckpointError, match=words) as caught:
            attempt()
        assert "board.json" in str(caught.value)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("field", "value"), [("window", "512"), ("texts", "wiki.txt"), ("file_bytes", True), ("name", None), ("bpw", "4")]
)
def test_a_field_of_the_wrong_kind_is_named(field, value, tmp_path):
    path = tmp_path / "board.json"
    append(path, [row(), row("b.gguf")])
    data = json.loads(path.read_text())
    data["rows"][1][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"row 2, {field} is"):
        read_board(path)


def _write_five(path: Path, writer: int) -> None:
    for number in range(5):
        append(path, [row(f"{writer}-{number}.gguf")])


def test_writers_at_the_same_time_lose_no_rows(tmp_path):
    path, fork = tmp_path / "board.json", multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_five, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {r.name for r in read_board(path).rows} == {f"{w}-{n}.gguf" for w in range(4) for n in range(5)}


def test_a_crash_while_writing_leaves_the_old_board(tmp_path, monkeypatch):
    path = tmp_path / "board.json"
    append(path, [row()])
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="no space left"):
        append(path, [row("b.gguf")])
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"board.json", ".board.json.lock"}


def test_a_lock_that_is_held_ends_in_an_error(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(boards, "LOCK_SECONDS", 0.05)
    with FileLock(tmp_path / ".board.json.lock"), pytest.raises(OutputError, match="another program"):
        append(tmp_path / "board.json", [row()])
    assert not (tmp_path / "board.json").exists()


def test_a_board_where_none_can_be_written_is_refused_before_anything_runs(tmp_path):
    for attempt in (require_board, lambda path: append(path, [row()])):
        with pytest.raises(QuantkitError, match="does not exist"):
            attempt(tmp_path / "no" / "board.json")
