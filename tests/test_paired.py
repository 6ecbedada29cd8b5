"""Flips between models on the same documents."""

from __future__ import annotations

import math

import pytest

from quantkit.evaluation.lm_eval.flips import changed
from quantkit.evaluation.lm_eval.paired import paired, paired_perplexities
from quantkit.evaluation.lm_eval.results import EvalReport, Item, ModelScores, Score, TaskScores


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


def read(name: str, *texts: tuple[float, float], windows: tuple[float, ...] = (), members: tuple[str, ...] = ()) -> ModelScores:
    """A model that read texts, (log-likelihood, weight) each."""
    items = tuple(
        Item(n, f"t{n}", {"word_perplexity": text, "bits_per_byte": text}, windows or (text[0],)) for n, text in enumerate(texts)
    )
    results = {"texts": TaskScores("texts", 0, "1", len(texts), (), items)}
    if members:
        results["group"] = TaskScores("group", 0, "1", 0, (), (), members)
    return ModelScores(name, name, "torch", name, None, 512, 0, 1.0, results)


def test_a_ratio_of_perplexities_has_its_paired_error():
    """Differences of −2 and −1 nats over 5 and 10 words: log ratio 0.2, its error 2 ÷ 15."""
    models = read("first", (-10.0, 5.0), (-20.0, 10.0)), read("second", (-12.0, 5.0), (-21.0, 10.0))
    ratio, bits = paired_perplexities(EvalReport(("texts",), models))
    assert (ratio.metric, ratio.items, ratio.over, ratio.is_ratio) == ("word_perplexity", 2, "documents", True)
    assert (ratio.before, ratio.after) == pytest.approx((math.exp(2), math.exp(2.2)))
    assert ratio.change == pytest.approx(math.exp(0.2)) and ratio.error == pytest.approx(math.exp(0.2) * 2 / 15)
    reach = 12.7062 * 2 / 15
    assert (ratio.interval.low, ratio.interval.high) == pytest.approx((math.exp(0.2 - reach), math.exp(0.2 + reach)), rel=1e-4)
    assert bits.metric == "bits_per_byte" and not bits.is_ratio and bits.change == pytest.approx(0.2 / math.log(2))
    assert (bits.before, bits.error) == pytest.approx((2 / math.log(2), 2 / 15 / math.log(2)))
    assert bits.interval.low < bits.change < bits.interval.high
    assert bits.interval.high - bits.interval.low == pytest.approx(2 * reach / math.log(2), rel=1e-4)


def test_a_single_text_is_compared_by_its_windows():
    models = read("first", (-30.0, 15.0), windows=(-10.0, -20.0)), read("second", (-33.0, 15.0), windows=(-12.0, -21.0))
    found = paired_perplexities(EvalReport(("texts",), models))[0]
    assert (found.items, found.over) == (2, "windows") and found.change == pytest.approx(math.exp(3 / 15))
    assert found.error == pytest.approx(found.change * math.sqrt(2 * (0.25 + 0.25)) / 15)  # −2 and −1 around −1.5
    (alone, _) = paired_perplexities(EvalReport(("texts",), (read("a", (-3.0, 2.0)), read("b", (-4.0, 2.0)))))
    assert alone.change == pytest.approx(math.exp(0.5)) and alone.error is None and alone.interval is None


def test_perplexities_that_cannot_be_compared_are_left_out():
    models = read("first", (-10.0, 5.0), (-20.0, 10.0)), read("second", (-12.0, 5.0), (-21.0, 11.0))
    assert paired_perplexities(EvalReport(("texts",), models)) == []  # another tokenizer's tokens
    groups = [read(name, (-10.0 * n, 5.0), members=("texts",)) for n, name in ((1, "first"), (9000, "second"))]
    report = EvalReport(("group",), tuple(groups))
    assert paired_perplexities(report) == [] and len(paired_perplexities(report, members=True)) == 2
    assert paired_perplexities(report, members=True)[0].change == math.inf  # a wrecked model is no error


def test_members_have_lines_of_their_own_and_their_p_values_are_adjusted():
    report = EvalReport(("group",), (model("first", a="1" * 8, b="1111"), model("second", a="0" * 8, b="1110")))
    (group,) = paired(report)
    assert group.p_holm == group.flips.p_value == pytest.approx(2 / 2**9)
    a, b = paired(report, members=True)
    assert (a.task, a.flips.lost, b.task, b.flips.lost) == ("a", 8, "b", 1)
    assert a.flips.p_value == pytest.approx(2 / 2**8) and a.p_holm == pytest.approx(2 * 2 / 2**8)
    assert b.flips.p_value == b.p_holm == 1


def several(name: str, *rights: int) -> ModelScores:
    """A model that was asked four times, with so many right answers to each question."""
    items = tuple(
        Item(n, f"t{n}", {"pass@1": right / 4, "pass@4": float(right > 0)}, samples=4) for n, right in enumerate(rights)
    )
    scores = (Score("pass@1", sum(rights) / 4 / len(rights), 0.1, "share", True),)
    return ModelScores(name, name, "torch", name, None, 512, 0, 1.0, {"a": TaskScores("a", 0, "1", len(rights), scores, items)})


def test_shares_of_several_answers_differ_and_do_not_flip():
    report = EvalReport(("a",), (several("first", 4, 2, 0), several("second", 1, 2, 0)), samples=4)
    once, four = paired(report)
    assert once.metric == "pass@1" and once.flips is None and once.p_holm is None
    assert once.difference.mean == pytest.approx(-0.75 / 3) and once.difference.error == pytest.approx(0.25)
    assert four.flips is None and four.difference.mean == 0 and changed(report) == []


def told(name: str, **tasks: str) -> ModelScores:
    """A model whose answers are right where a task has "1", with words for everything."""
    found = model(name, **tasks)
    score = (Score("acc", 0.5, None, "share", True),)
    for task, result in found.results.items():
        items = tuple(
            Item(
                i.doc, i.hash, {"acc": i.scores["acc"]}, question=f"{task}{i.doc}?", expected="yes", said={"acc": f"{name} says"}
            )
            for i in result.items
        )
        found.results[task] = TaskScores(task, 0, "1", len(items), score, items, result.members)
    return found


def test_questions_lost_and_gained_are_listed_with_what_was_said():
    report = EvalReport(("group",), (told("first", a="1110", b="110"), told("second", a="0001", b="010")))
    (found,) = changed(report, few=3)
    assert (found.task, found.metric, found.model, found.reference) == ("group", "acc", "second", "first")
    assert (found.n_lost, found.n_gained) == (4, 1)
    assert [(one.task, one.doc) for one in found.lost] == [("a", 0), ("b", 0), ("a", 1)]  # of each task one, then a second
    assert [(one.task, one.doc) for one in found.gained] == [("a", 3)]
    one = found.lost[0]
    assert (one.question, one.expected, one.before, one.after) == ("a0?", "yes", "first says", "second says")
    assert len(changed(report)[0].lost) == 4
