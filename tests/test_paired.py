"""Flips between models on the same documents."""

from __future__ import annotations

import pytest

from quantkit.evaluation.lm_eval_results import EvalReport, Item, ModelScores, TaskScores
from quantkit.evaluation.paired import paired


def model(name: str, **tasks) -> ModelScores:
    """A model whose answers are right where a task has "1"; ``group`` has all tasks."""
    results = {
        task: TaskScores(task, 0, "1", len(verdicts), (), tuple(
            Item(n, f"{task}{n}", {"acc": float(v), "word_perplexity": (-1.0, 2.0)}) for n, v in enumerate(verdicts)
        )) for task, verdicts in tasks.items()
    }  # fmt: skip
    results["group"] = TaskScores("group", 0, "1", 0, (), (), tuple(tasks))
    return ModelScores(name, name, "torch", name, None, 512, 0, 1.0, results)


def test_what_flipped_is_counted_by_document():
    report = EvalReport(
        ("a", "group"), (model("first", a="1100", b="11"), model("second", a="1010", b="00"), model("third", a="1100", b="11"))
    )
    a, group, same, _ = paired(report)
    assert (a.flips.both_right, a.flips.lost, a.flips.gained, a.flips.both_wrong) == (1, 1, 1, 1) and a.flips.p_value == 1
    assert (group.flips.lost, group.flips.gained, group.flips.total) == (3, 1, 6)
    assert group.flips.p_value == pytest.approx(2 * (1 + 4) / 16)  # four changes, one of them or none the other way
    assert (
        group.difference.mean == pytest.approx(-2 / 6) and group.difference.interval.low < -2 / 6 < group.difference.interval.high
    )
    assert {one.metric for one in paired(report)} == {"acc"} and (a.model, a.reference) == ("second", "first")
    assert same.flips.lost == same.flips.gained == 0 and same.flips.p_value == 1 and same.difference.mean == 0


def test_only_documents_that_both_answered_count_and_equal_ones_by_their_place():
    before, after = model("first", a="111"), model("second", a="10")
    (found, _) = paired(EvalReport(("a", "group"), (before, after)))
    assert found.flips.total == 2 and found.flips.lost == 1
    twice = tuple(Item(n, "same", {"acc": 1.0}) for n in range(2))
    for one in (before, after):
        one.results["a"] = TaskScores("a", 0, "1", 2, (), twice)
    assert paired(EvalReport(("a",), (before, after)))[0].flips.total == 2
