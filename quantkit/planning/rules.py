"""What a user asks a dynamic plan to keep to, as it is written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.checkpoint import Checkpoint
from quantkit.planning.policy import Keep, Policy, parse_floors
from quantkit.planning.speed import SpeedRequest


@dataclass(frozen=True)
class Rules:
    """keep: ``regex=FORMAT``. only: names or patterns (``Q?_K``) of the formats that may be used. floors: ``ROLE=FORMAT``.
    speed: tokens per second that the plan must reach. adapter_bytes: of the budget, left to an adapter."""

    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    floors: Sequence[str] = ()
    speed: SpeedRequest | None = None
    adapter_bytes: int = 0

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return bool(self.keep or self.only or self.floors or self.speed is not None or self.adapter_bytes)

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The same as a policy. Raises PlanError for a rule that is none, or that nothing in the model matches."""
        policy = Policy(
            keeps=[Keep.parse(text) for text in self.keep], patterns=tuple(self.only), floors=parse_floors(self.floors)
        )
        policy.check_used(checkpoint)
        return policy
