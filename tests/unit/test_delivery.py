"""The one place where it is decided what becomes of a delivery."""

from __future__ import annotations

import pytest

from quintet import ConfigurationError, DeadlineExceeded, InvalidMessage, Redelivery, Safety, UnsupportedMediaType
from quintet.delivery import HandlerFailed, decide
from quintet.testing import FakeClock
from quintet.transport import Again, Dead, Done

CLOCK = FakeClock()


@pytest.mark.parametrize(
    ("error", "attempt", "verdict"),
    [
        (HandlerFailed(ValueError("x")), 1, Again),
        (HandlerFailed(ValueError("x")), 4, Again),
        (HandlerFailed(ValueError("x")), 5, Dead),
        (HandlerFailed(InvalidMessage("a nested call's complaint")), 1, Again),
        (HandlerFailed(DeadlineExceeded("a nested call's", safety=Safety.NOT_SENT)), 1, Again),
        (InvalidMessage("this message does not fit"), 1, Dead),
        (UnsupportedMediaType("nor can it be read"), 1, Dead),
        (DeadlineExceeded("expired before work was begun", safety=Safety.NOT_SENT), 1, Done),
    ],
)
def test_each_failure_has_its_verdict(error: Exception, attempt: int, verdict: type) -> None:
    assert isinstance(decide(error, attempt, Redelivery(), CLOCK), verdict)


def test_the_wait_grows_is_spread_by_chance_and_has_a_limit() -> None:
    redelivery = Redelivery(first=1.0, factor=3.0, longest=20.0)
    assert [redelivery.wait(attempt, 1.0) for attempt in (1, 2, 3, 4, 500)] == [1.0, 3.0, 9.0, 20.0, 20.0]
    assert [redelivery.wait(attempt, 0.0) for attempt in (1, 2)] == [0.5, 1.5]


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first": -1.0}, {"factor": 0.5}, {"longest": 0.1}])
def test_a_redelivery_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="attempts must be 1 or more"):
        Redelivery(**wrong)  # type: ignore[arg-type]
