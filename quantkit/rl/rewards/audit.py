"""Does a learned reward, or a judge, still say what it should: an exact reward is computed beside it, and never trained on.

A model that is trained on a score learns what raises the score; whether that is what was wanted, the score cannot tell.
So an exact reward looks at the same completions, only to be compared.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import RewardError
from quantkit.rl.rewards.base import Reward

ERRORS = 3.0  # standard errors that a change must have to be one
LEAST = 10  # steps before anything is said
TRAINERS = ("trainer_state", "log_extra", "log_metric")  # columns that are none: TRL's own, which only the reward is given


@dataclass(frozen=True)
class Step:
    """One call: means of both rewards, and what their agreement is made of: sums over completions of the products of ranks
    within a prompt (audited × exact, audited², exact²), ranks counted from the prompt's mean."""

    audited: float
    exact: float
    products: npt.NDArray[np.float64]


class Audit:
    """What is known of two rewards that should agree. window: steps that count as now; the first so many are the beginning.

    raised: the first alarm and its step, None if there was none.
    """

    def __init__(self, audited: str, exact: str, window: int) -> None:
        self._names = audited, exact
        self._beginning: list[Step] = []
        self._now: deque[Step] = deque(maxlen=window)
        self._window, self._seen = window, 0
        self.raised: tuple[int, str] | None = None

    def add(self, groups: list[tuple[list[float], list[float]]]) -> None:
        """Take note of one step. groups: for each prompt the values of its completions, audited and exact."""
        from scipy.stats import rankdata

        self._seen += 1
        if not groups:
            return
        products = np.zeros(3)
        for values in groups:
            a, b = (ranks - ranks.mean() for ranks in map(rankdata, values))
            products += [a @ b, a @ a, b @ b]
        audited, exact = (float(np.mean([value for group in groups for value in group[which]])) for which in (0, 1))
        step = Step(audited, exact, products)
        self._now.append(step)
        if len(self._beginning) < self._window:
            self._beginning.append(step)
        if self.raised is None and (alarm := self.alarm()):
            self.raised = self._seen, alarm

    def metrics(self) -> dict[str, float]:
        """Over the window: ``agreement`` (Spearman's rank correlation within prompts, from −1 to 1), and the means of both, by name.

        Empty before the first step; no agreement where one of the rewards never told completions of a prompt apart.
        """
        if not self._now:
            return {}
        agreement = _agreement([*self._now])[0]
        means = {"audited": [step.audited for step in self._now], "exact": [step.exact for step in self._now]}
        found = {name: float(np.mean(values)) for name, values in means.items()}
        return found if math.isnan(agreement) else {"agreement": agreement, **found}

    def alarm(self) -> str | None:
        """A sentence if the two part now, else None.

        They part if over the window the audited mean rises and the exact one falls, both slopes by more than three standard
        errors; or if the agreement is below 0, or below half of what it was at the beginning, by more than three standard
        errors (jackknife over steps). Nothing is said before ten steps. Honest judges raise none in 16 simulated runs of 200
        steps (tests/test_judge.py).
        """
        steps = [*self._now]
        return None if len(steps) < LEAST else self._parting(steps) or self._disagreeing(steps)

    def _parting(self, steps: list[Step]) -> str | None:
        audited, exact = self._names
        first, second = _trend([step.audited for step in steps]), _trend([step.exact for step in steps])
        if first.errors <= ERRORS or second.errors >= -ERRORS:
            return None
        return (
            f"over the last {len(steps)} steps {audited} rises from {first.begin:.3g} to {first.end:.3g} while {exact} falls from "
            f"{second.begin:.3g} to {second.end:.3g}: the model learns what pays, not what is right"
        )

    def _disagreeing(self, steps: list[Step]) -> str | None:
        audited, exact = self._names
        now, error = _agreement(steps)
        begun, doubt = _agreement(self._beginning)
        if now < -ERRORS * error:
            return f"over the last {len(steps)} steps {audited} ranks completions against {exact} (agreement {now:.2f})"
        if now < begun / 2 - ERRORS * math.hypot(error, doubt / 2):
            return f"{audited} agreed with {exact} by {begun:.2f} at the beginning, over the last {len(steps)} steps by {now:.2f}"
        return None


@dataclass(frozen=True)
class Trend:
    """A line through the means of steps. errors: its slope in standard errors of the slope."""

    begin: float
    end: float
    errors: float


def _trend(values: list[float]) -> Trend:
    from scipy.stats import linregress

    if max(values) == min(values):
        return Trend(values[0], values[0], 0.0)
    line = linregress(range(len(values)), values)
    errors = line.slope / line.stderr if line.stderr else math.copysign(math.inf, line.slope)
    return Trend(float(line.intercept), float(line.intercept + line.slope * (len(values) - 1)), float(errors))


def _agreement(steps: list[Step]) -> tuple[float, float]:
    """Spearman's rank correlation within prompts, pooled over steps, and its standard error (jackknife over steps); NaN where
    it has none."""
    products = np.array([step.products for step in steps])  # (steps, 3)
    every = products.sum(0)
    without = every - products
    with np.errstate(divide="ignore", invalid="ignore"):
        value = every[0] / np.sqrt(every[1] * every[2])
        others = without[:, 0] / np.sqrt(without[:, 1] * without[:, 2])
    return float(value), float(np.sqrt((len(steps) - 1) * np.var(others)))


class Audited:
    """The reward that is trained on, unchanged. audit: what an exact one says of the same completions; see ``audited``."""

    def __init__(self, reward: Reward, exact: Reward, share: float, window: int, seed: int) -> None:
        self.__name__ = reward.__name__
        self.audit = Audit(reward.__name__, exact.__name__, window)
        self._reward, self._exact, self._share, self._seed = reward, exact, share, seed

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        values = self._reward(prompts=prompts, completions=completions, **columns)
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(json.dumps(prompt, sort_keys=True, default=str), []).append(place)
        looked = [places for key, places in groups.items() if self._drawn(key, [completions[place] for place in places])]
        self.audit.add(self._compared(looked, values, prompts, completions, columns))
        log = columns.get("log_metric")
        if callable(log):  # TRL's, which puts it into the log of the step
            for name, value in {**self.audit.metrics(), "alarm": float(self.audit.alarm() is not None)}.items():
                log(f"audit/{self.__name__}/{name}", value)
        return values

    def _drawn(self, prompt: str, completions: list[Any]) -> bool:
        """Whether a prompt belongs to the share: the same in a run that goes on, and no random number of training is used."""
        said = json.dumps([self._seed, prompt, completions], sort_keys=True, default=str)
        return int.from_bytes(sha256(said.encode()).digest()[:8]) < self._share * 2**64

    def _compared(self, groups: list[list[int]], values: list[float | None], prompts: list[Any], completions: list[Any],
                  columns: dict[str, Any]) -> list[tuple[list[float], list[float]]]:  # fmt: skip
        """Both rewards of the completions that have both, by prompt."""
        chosen = [place for places in groups for place in places]
        if not chosen:
            return []
        own = {
            name: [value[place] for place in chosen] if isinstance(value, list | tuple) and len(value) == len(prompts) else value
            for name, value in columns.items() if name not in TRAINERS
        }  # fmt: skip
        exact = self._exact(
            prompts=[prompts[place] for place in chosen], completions=[completions[place] for place in chosen], **own
        )
        truth = dict(zip(chosen, exact, strict=True))
        found = []
        for places in groups:
            both = [(values[place], truth[place]) for place in places]
            kept = [(float(a), float(b)) for a, b in both if a is not None and b is not None]
            if kept:
                found.append(([a for a, _ in kept], [b for _, b in kept]))
        return found


def audited(reward: Reward, exact: Reward, share: float = 1.0, window: int = 30, seed: int = 0) -> Audited:
    """``reward`` under its own name, with ``.audit`` beside it: ``exact`` is computed on the same completions but never returned.

    share: of the prompts whose completions are compared (all completions of a prompt, or none), drawn by their hash and
    ``seed``. window: steps that count as now. ``audit.metrics()`` and ``audit.alarm()`` tell how they agree; TRL's log gets
    both as audit/NAME/…. Raises RewardError for a share or a window that cannot be.
    """
    if not 0 < share <= 1:
        raise RewardError(f"a share of {share:g} of the prompts cannot be compared", hint="give more than 0, at most 1")
    if window < LEAST:
        raise RewardError(f"a window of {window} steps is too short to tell", hint=f"give {LEAST} or more")
    return Audited(reward, exact, share, window, seed)
