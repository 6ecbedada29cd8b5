"""KL divergence and its summary, against the textbook in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import metrics
from quantkit.metrics import TokenScores, kl_divergence, kl_divergence_reference, summarize


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 3.0))
def test_kl_divergence_is_the_textbook_one(seed, noise):
    rng = np.random.default_rng(seed)
    p = (3 * rng.standard_normal((5, 300))).astype(np.float32)
    q = (p + noise * rng.standard_normal(p.shape)).astype(np.float32)
    ours = kl_divergence(torch.from_numpy(p).log_softmax(-1), torch.from_numpy(q)).numpy()
    np.testing.assert_allclose(ours, kl_divergence_reference(p, q), rtol=2e-3, atol=2e-8)


def test_rows_a_few_at_a_time_give_the_same(monkeypatch):
    """Pieces of three rows, the last one shorter."""
    monkeypatch.setattr(metrics, "CACHED", 900)
    p, q = torch.randn(8, 300), torch.randn(8, 300)
    logp = p.log_softmax(-1)
    found = metrics.kl_divergence_by_rows(logp, logp.exp(), q, q.logsumexp(-1))
    np.testing.assert_allclose(found.numpy(), kl_divergence_reference(p.numpy(), q.numpy()), rtol=1e-5)


def test_best_and_logsumexp_are_torchs(monkeypatch):
    """Pieces of three rows; logits of −∞ and far from zero, where a plain sum of exponentials overflows."""
    monkeypatch.setattr(metrics, "CACHED", 900)
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    logits[1] += 500
    logits[2] -= 500
    logits[3, :299] = -torch.inf
    best, total = metrics.best_and_logsumexp(logits)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(total, logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_kl_divergence_of_a_model_with_itself_is_zero():
    p = torch.randn(4, 100)
    assert kl_divergence(p.log_softmax(-1), p).abs().max() < 1e-9
    total = p.logsumexp(-1)
    logp = p - total[:, None]
    assert not metrics.kl_divergence_by_rows(logp, logp.exp(), p, total).any()


def test_kl_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)


def test_summary():
    n = 1000
    rng = np.random.default_rng(0)
    kld = rng.random(n).astype(np.float32)
    reference = -rng.random(n).astype(np.float32)
    scores = TokenScores(kld, reference - 0.1, reference, np.arange(n) % 4 != 0)
    out = summarize(scores)
    assert out.tokens == n and out.mean_kld == pytest.approx(kld.mean(), rel=1e-6)
    assert out.mean_kld_error == pytest.approx(kld.std() / math.sqrt(n - 1), rel=1e-5)
    assert out.perplexity_ratio == pytest.approx(math.exp(0.1), rel=1e-5)
    assert out.perplexity_ratio_error < 1e-6  # a constant difference has no spread
    assert out.top1_agreement == 0.75 and out.median_kld <= out.p99_kld <= out.p999_kld <= out.max_kld
    with pytest.raises(ValueError, match="no tokens"):
        summarize(TokenScores(*(np.zeros(0, np.float32),) * 3, np.zeros(0, bool)))
