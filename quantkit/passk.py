"""pass@k and majority@k from n completions of each prompt.

pass@k: the chance that at least one of k completions is right, without bias from n ≥ k of which c are (Chen et al.,
"Evaluating Large Language Models Trained on Code", arXiv 2107.03374). majority@k: the chance that the most frequent
answer among k completions is right (Wang et al., "Self-Consistency", arXiv 2203.11171); equally frequent answers are
chosen among with equal chances.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence

SUBSETS = 5000  # of k completions that majority@k is averaged over at most


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 − C(n − right, k) ÷ C(n, k). Raises ValueError unless 0 ≤ right ≤ n and 1 ≤ k ≤ n."""
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} completions of which {right} are right")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """Mean over all sets of k completions, or over 5,000 random ones. None is no answer and never wins against one.

    Raises ValueError unless 1 ≤ k ≤ n.
    """
    n = len(answers)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(f"majority@{k} of {n} completions and {len(right)} verdicts")
    if math.comb(n, k) <= SUBSETS:
        subsets = list(itertools.combinations(range(n), k))
    else:
        draws = random.Random(seed)
        subsets = [tuple(draws.sample(range(n), k)) for _ in range(SUBSETS)]
    return sum(_chance(answers, right, subset) for subset in subsets) / len(subsets)


def _chance(answers: Sequence[Hashable | None], right: Sequence[bool], subset: Sequence[int]) -> float:
    """Chance that the most frequent answer of a subset is right."""
    counts = Counter(answers[place] for place in subset if answers[place] is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    verdicts = {answers[place]: right[place] for place in subset}
    return sum(verdicts[answer] for answer in leaders) / len(leaders)
