"""What can go wrong, in words a user can act on.

Every error that a user's input can cause is a :class:`QuantkitError`. Its message is one line that
says what failed, where (file, tensor, value) and what to do; the command line prints just that line.
"""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of all errors with a way out. ``str(error)`` is one line."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what = " ".join(what.split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.what}; {self.hint}" if self.hint else self.what)


class CheckpointError(QuantkitError):
    """A model on disk that is damaged, unsafe or of an unknown kind."""


class FormatError(QuantkitError):
    """An unknown format, or data that a format cannot hold."""


class CalibrationError(QuantkitError):
    """Calibration text or statistics that cannot be used."""


class PlanError(QuantkitError):
    """A plan that is invalid, or a budget that no plan can meet."""


class AdapterError(QuantkitError):
    """An adapter that does not belong to its base, or training that cannot be done."""


class RewardError(QuantkitError):
    """A reward function that fails, or data that rewards cannot be computed from."""


class OutputError(QuantkitError):
    """Output that cannot be written: it exists, equals the input, or the disk is full."""


class MissingDependencyError(QuantkitError):
    """An optional package that is not installed."""
