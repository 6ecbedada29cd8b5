"""Paired statistics against values worked out by hand, and the groups in which divergence is counted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import comb

import numpy as np
import pytest

from quantkit.evaluation.breakdown import ExactWindow, Judged, Tally, frequency_ranks, judge
from quantkit.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    flips,
    holm,
    mcnemar,
    paired_difference,
    paired_ratio,
    ratio_interval,
    standard_error,
)
from quantkit.metrics import TokenScores


def test_flips_are_counted_in_both_directions():
    before = [True] * 5 + [False] * 4
    after = [True, True, False, False, False, True, False, False, False]
    found = flips(before, after)
    assert (found.both_right, found.lost, found.gained, found.both_wrong, found.total) == (2, 3, 1, 3, 9)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)
    with pytest.raises(ValueError, match="9 answers before, 8 after"):
        flips(before, after[:8])


@pytest.mark.parametrize(("lost", "gained"), [(6, 16), (0, 5), (59, 6), (1, 2)])
def test_mcnemar_equals_the_sum_of_binomial_chances(lost, gained):
    n = lost + gained
    by_hand = min(1.0, 2 * sum(comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n)
    assert mcnemar(lost, gained) == pytest.approx(by_hand, rel=1e-12) == pytest.approx(mcnemar(gained, lost))


def test_mcnemar_without_evidence_is_one():
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(6, 16) == pytest.approx(110056 / 2**21)  # 2 · (1 + 22 + 231 + 1540 + 7315 + 26334 + 74613) ÷ 2²²


def test_the_error_of_a_paired_difference_is_that_of_the_differences():
    before, after = np.array([1.0, 4.0, 2.0, 8.0]), np.array([2.0, 4.0, 5.0, 8.0])  # differences 1, 0, 3, 0
    found = paired_difference(before, after)
    assert found.mean == 1.0 and found.items == found.blocks == 4 and (found.before, found.after) == (3.75, 4.75)
    assert found.error == pytest.approx(np.sqrt(6 / 3 / 4))  # Σ(d − 1)² = 6
    with pytest.raises(ValueError, match="4 items before, 3 after"):
        paired_difference(before, after[:3])


def test_tokens_of_one_document_do_not_count_as_independent():
    rng = np.random.default_rng(1)
    documents = rng.normal(size=40)
    values, blocks = np.repeat(documents, 100), np.repeat(np.arange(40), 100)
    by_document = documents.std(ddof=1) / np.sqrt(40)
    assert standard_error(values, blocks) == pytest.approx(by_document)
    assert standard_error(values) < by_document / 9
    found = bootstrap_mean(values, blocks)
    assert found.high - found.low == pytest.approx(2 * 1.96 * by_document, rel=0.1)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_cover_as_often_as_they_say(method):
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(1, 9, 30)
        blocks = np.repeat(np.arange(30), sizes)
        values = np.repeat(rng.normal(0.5, 1, 30), sizes) + rng.normal(size=sizes.sum())
        found = bootstrap_mean(values, blocks, resamples=400, seed=trial, method=method)
        hits += found.low <= 0.5 <= found.high
    assert 175 <= hits <= 199  # 190 expected; small samples cover a little less


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_one_block_has_no_spread_and_equal_blocks_have_none():
    assert bootstrap_mean([1.0, 2.0], [7, 7]) is None and standard_error([1.0, 2.0], [7, 7]) is None
    assert bootstrap_mean(np.zeros(9), method="BCa") == Interval(0.0, 0.0)
    with pytest.raises(ValueError, match="2 items in 3 blocks"):
        bootstrap_mean([1.0, 2.0], [0, 1, 2])


def test_the_interval_of_a_ratio_is_that_of_its_logarithm():
    assert ratio_interval(None) is None
    found = ratio_interval(Interval(-0.1, 0.2))
    assert (found.low, found.high) == pytest.approx((np.exp(-0.1), np.exp(0.2)))
    assert ratio_interval(Interval(-1e4, 1e4)) == Interval(0.0, np.inf)


WINDOWS = np.array([[0, 5, 6, 7, 7, 8, 7, 9, 7], [0, 7, 6, 7, 5, 8, 7, 9, 6]])  # scored: positions 4 to 7 of 9


def judged_window(seed: int, index: int):
    """(known, judged, logits of both) of made-up models with ten tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(4, 10, generator=generator) * 3
    candidate = original + torch.randn(4, 10, generator=generator)
    known = ExactWindow.of(original, WINDOWS[index, 5:])
    return known, judge(known, candidate, WINDOWS[index, 5:]), original, candidate


def tally_of(judged) -> Tally:
    tally = Tally(WINDOWS, [("a.txt", 1), ("b.txt", 1)], worst=3)
    for index, (known, result, *_) in enumerate(judged):
        tally.add(index, known, result)
    return tally


def test_a_judged_window_has_the_textbook_scores():
    known, result, original, candidate = judged_window(0, 0)
    p, q = original.double().log_softmax(-1), candidate.double().log_softmax(-1)
    following = WINDOWS[0, 5:]
    assert result.scores.kld == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), rel=1e-5)
    assert result.scores.logp == pytest.approx(q.numpy()[range(4), following], abs=1e-6)
    assert result.scores.reference_logp == pytest.approx(p.numpy()[range(4), following], abs=1e-6)
    assert (result.scores.same_top == (p.argmax(-1) == q.argmax(-1)).numpy()).all()
    assert (result.guess == q.argmax(-1).numpy()).all() and result.guess_logp == pytest.approx(q.amax(-1).numpy(), abs=1e-6)
    assert known.entropy == pytest.approx(-(p.exp() * p).sum(-1).numpy(), rel=1e-5)
    assert known.top1_logp == pytest.approx(p.amax(-1).numpy(), abs=1e-6)


def test_groups_add_up_to_the_whole_on_every_axis():
    judged = [judged_window(0, 0), judged_window(1, 1)]
    klds = [result.scores.kld.astype(float) for _, result, *_ in judged]
    found = tally_of(judged).result(str)
    assert [(g.name, g.tokens) for g in found.text] == [("a.txt", 4), ("b.txt", 4)]
    for group, kld, (_, result, *_) in zip(found.text, klds, judged, strict=True):
        assert group.mean_kld == pytest.approx(kld.mean()) and group.error == pytest.approx(kld.std() / np.sqrt(3))
        assert group.share == pytest.approx(kld.sum() / np.sum(klds))
        assert group.top1_agreement == pytest.approx(result.scores.same_top.mean())
    for axis in ("text", "position", "frequency", "certainty", "entropy"):
        groups = getattr(found, axis)
        assert sum(g.tokens for g in groups) == 8 and sum(g.share for g in groups) == pytest.approx(1), axis
    assert [g.name for g in found.position] == ["5–5", "6–6", "7–7", "8–8"]
    assert found.position[2].mean_kld == pytest.approx((klds[0][2] + klds[1][2]) / 2)
    json.dumps(asdict(found))


def test_tokens_are_put_where_their_rank_and_the_originals_certainty_say():
    assert frequency_ranks(np.array([[2, 2, 2, 5, 5, 1]]))[[2, 5, 1]].tolist() == [1, 2, 3]
    rng = np.random.default_rng(0)
    windows = np.concatenate([np.repeat(np.arange(12), 40), np.arange(12, 60)])[None].repeat(2, 0)  # 528 tokens
    scored = 528 - 264 - 1
    known = ExactWindow(
        None, None, np.zeros(scored), np.zeros(scored, int), np.log(np.linspace(0.05, 0.995, scored)), np.full(scored, 0.7)
    )
    kld = rng.random(scored).astype(np.float32)
    scores = TokenScores(kld, kld, kld, kld > 0.5)
    tally = Tally(windows, [("a", 2)])
    tally.add(1, known, Judged(scores, np.zeros(scored, int), np.zeros(scored), np.zeros(scored)))
    found = tally.result(str)
    following = windows[1, 265:]
    assert [(g.name, g.tokens) for g in found.frequency] == [
        ("1–10", int((following < 10).sum())),
        ("11–100", int((following >= 10).sum())),
    ]
    chances = np.exp(known.top1_logp)
    assert [g.name for g in found.certainty] == ["below 20%", "20% to 50%", "50% to 90%", "90% to 99%", "99% and above"]
    assert found.certainty[1].tokens == int(((chances >= 0.2) & (chances < 0.5)).sum())
    assert [(g.name, g.tokens) for g in found.entropy] == [("0.5 to 1", scored)]


def test_the_worst_tokens_are_shown_in_their_context():
    judged = [judged_window(0, 0), judged_window(1, 1)]
    found = tally_of(judged).result(lambda ids: " ".join(map(str, ids)))
    every = sorted(((k, w, i) for w in (0, 1) for i, k in enumerate(judged[w][1].scores.kld.tolist())), reverse=True)
    assert [worst.kld for worst in found.worst] == [kld for kld, _, _ in every[:3]]
    for worst, (_, window, place) in zip(found.worst, every, strict=False):
        _, _, original, candidate = judged[window]
        assert worst.text == ["a.txt", "b.txt"][window]
        assert worst.context == " ".join(map(str, WINDOWS[window, : 5 + place]))
        assert worst.following == str(WINDOWS[window, 5 + place])
        assert worst.original_guess == str(int(original[place].argmax()))
        assert worst.original_chance == pytest.approx(float(original[place].softmax(-1).max()), rel=1e-5)
        assert worst.candidate_guess == str(int(candidate[place].argmax()))
        assert worst.candidate_chance == pytest.approx(float(candidate[place].softmax(-1).max()), rel=1e-5)


def test_an_identical_candidate_has_no_divergence_to_share():
    known, _, original, _ = judged_window(0, 0)
    tally = Tally(WINDOWS, [("a.txt", 2)])
    result = judge(known, original, WINDOWS[0, 5:])
    tally.add(0, known, replace(result, scores=replace(result.scores, kld=np.zeros(4, np.float32))))
    found = tally.result(str)
    assert found.text[0].mean_kld == found.text[0].share == 0 and found.text[0].top1_agreement == 1


def test_a_ratio_of_sums_has_the_error_of_its_differences():
    found = paired_ratio([-10.0, -20.0], [-12.0, -21.0], [5, 10])  # differences −2 and −1, of which −0.2 · weight is expected
    assert found.before == -2 and found.after == pytest.approx(-2.2) and found.mean == pytest.approx(-0.2)
    assert found.error == pytest.approx(np.sqrt(2 * (1 + 1)) / 15)
    reach = 12.7062 * found.error  # Student's quantile of one degree of freedom
    assert (found.interval.low, found.interval.high) == pytest.approx((-0.2 - reach, -0.2 + reach), rel=1e-4)
    single = paired_ratio([-1.0], [-2.0], [4.0])
    assert single.mean == -0.25 and single.error is None and single.interval is None
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="2 items before, 2 after"):
            paired_ratio([1.0, 2.0], [1.0, 2.0], weights)


def texts(rng, n: int):
    """(log-likelihoods before, after, words) of n texts of very different lengths: after is worse by 0.1 nats per word."""
    words = rng.integers(50, 2000, n).astype(float)
    before = -words * rng.normal(4, 0.5, n)
    return before, before - words * rng.normal(0.1, 0.05, n), words


def test_the_delta_method_agrees_with_the_bootstrap():
    rng = np.random.default_rng(5)
    before, after, words = texts(rng, 200)
    found = paired_ratio(before, after, words)
    drawn = rng.integers(0, 200, (4000, 200))
    ratios = (after - before)[drawn].sum(1) / words[drawn].sum(1)
    assert found.error == pytest.approx(ratios.std(), rel=0.05)
    assert (found.interval.low, found.interval.high) == pytest.approx(
        np.quantile(ratios, [0.025, 0.975]), abs=0.1 * found.error * 2
    )
    apart = np.hypot(*(np.std(some / words) / np.sqrt(200) for some in (before, after)))
    assert found.error < apart / 5  # the texts are the same: their difficulty drops out


def test_intervals_of_few_texts_cover_as_often_as_they_say():
    rng = np.random.default_rng(6)
    hits = drawn_hits = 0
    for _ in range(1000):
        before, after, words = texts(rng, 6)
        found = paired_ratio(before, after, words)
        hits += found.interval.low <= -0.1 <= found.interval.high
        places = rng.integers(0, 6, (300, 6))
        low, high = np.quantile((after - before)[places].sum(1) / words[places].sum(1), [0.025, 0.975])
        drawn_hits += low <= -0.1 <= high
    assert 910 <= hits <= 980 and drawn_hits < 880  # 950 expected; what the bootstrap would have said is too narrow


def test_holm_multiplies_the_smallest_by_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # ·3, ·1 raised to 0.06, ·2, ·4
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_is_rarely_wrong_where_nothing_changed():
    """Of 17 tests without an effect, one at least is below 5 % more often than not; adjusted, in at most 5 % of all cases."""
    rng = np.random.default_rng(7)
    p_values = rng.random((2000, 17))
    assert (p_values.min(1) < 0.05).mean() > 0.5
    assert 0.035 < np.mean([min(holm(list(row))) < 0.05 for row in p_values]) < 0.065
