"""What becomes of a delivery (law 2): done, again later or dead, decided here and nowhere else."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from quintet.clock import Clock
from quintet.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidMessage,
    TooLarge,
    UnknownOperation,
    UnsupportedMediaType,
)
from quintet.transport import Again, Dead, Done, Verdict


class Redelivery(Struct, frozen=True, kw_only=True):
    """How often and when a delivery that failed comes again.

    `attempts`: how many in all, then the dead-letter channel. The n-th wait is `first` * `factor`^(n-1) seconds, at
    most `longest`, and between half and all of that by chance, so that what failed together does not return together.
    """

    attempts: int = 5
    first: float = 0.5
    factor: float = 2.0
    longest: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.factor < 1 or self.longest < self.first:
            raise ConfigurationError(
                f"{self!r}: attempts must be 1 or more, first 0 or more, factor 1 or more, longest at least first"
            )

    def wait(self, attempt: int, chance: float) -> float:
        """Seconds to wait after the given attempt failed; `chance` is from 0 to 1."""
        full = min(self.longest, self.first * self.factor ** min(attempt - 1, 64))
        return full * (0.5 + chance / 2)


class HandlerFailed(Exception):
    """The user's function raised what the contract does not declare: its cause may be anything, and stays inside."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(text_of(error))
        self.error = error


def text_of(error: BaseException) -> str:
    """The class and the text of an error, as text that can be written whatever is in it."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = f"{type(error).__name__}, whose text cannot be read"
    return text.encode(errors="backslashreplace").decode()


def is_cancelled() -> bool:
    """Tell whether the running task itself was asked to stop, and not only what it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def leaves(error: BaseException) -> bool:
    """Tell whether what a handler raised ends its task: a cancellation from outside, or Ctrl-C. All else is a failure,
    also a CancelledError of something that the handler started."""
    if isinstance(error, asyncio.CancelledError | BaseExceptionGroup):
        return not isinstance(error, Exception) and is_cancelled()
    return isinstance(error, GeneratorExit | KeyboardInterrupt)


_HOPELESS = (InvalidMessage, UnsupportedMediaType, UnknownOperation, TooLarge)  # the same bytes fail the same way again


def decide(error: Exception, attempt: int, redelivery: Redelivery, clock: Clock) -> Verdict:
    """The verdict on a delivery whose handler raised; its reason names the error, for who looks at dead letters."""
    cause = error.error if isinstance(error, HandlerFailed) else error
    reason = text_of(cause)
    if isinstance(error, DeadlineExceeded):
        return Done()  # it expired before work was begun, as its sender wished
    if isinstance(error, _HOPELESS):
        return Dead(reason)
    if attempt >= redelivery.attempts:
        return Dead(f"{reason} (attempt {attempt} of {redelivery.attempts})")
    return Again(redelivery.wait(attempt, clock.random.random()), reason)
