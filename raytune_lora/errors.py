"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """One or more problems with what the user asked for.

    Each problem states the rule, the values found and the remedy, in one sentence or two. The command line prints them
    without a traceback and exits with status 2.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        return type(self), (self.problems,)


class DivergedError(Exception):
    """The loss or the gradient stopped being a finite number."""

    def __init__(self, step: int, value: float) -> None:
        self.step = step
        self.value = value
        super().__init__(f"the loss is {value} at step {step}")

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float]]:
        return type(self), (self.step, self.value)
