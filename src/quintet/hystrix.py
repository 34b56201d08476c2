"""The stream that Hystrix' dashboards and Turbine read, of our breakers and limits (Hystrix 1.5.18)."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from quintet.fallback import CONCURRENT
from quintet.meter import Meter, percentiles
from quintet.outcome import ANSWERED, FAILURE, REFUSED, SHORT_CIRCUITED, SLOW, SUCCESS, TIMEOUT
from quintet.policy import Breaker

INTERVAL = 0.5  # seconds between two looks
ROLLING = 10  # seconds that counts look back
PERCENTILES = ("0", "25", "50", "75", "90", "95", "99", "99.5", "100")
PING = b"ping: \n\n"
UNLIMITED = 2**31 - 1  # where Hystrix wants a number and there is no limit


class Command(Struct):
    """What is shown of one circuit: its meter, and what was counted in the last seconds.

    `counts`: by OUTCOMES, of the last 10 s. `fallbacks`: likewise, as in Meter. `latencies`: of the last 60 s, by
    meter.BOUNDS, and `mean` in seconds. `peak`: the most outstanding requests of the last 10 s.
    """

    name: str
    group: str
    meter: Meter
    counts: list[int]
    fallbacks: dict[str, int]
    latencies: list[int]
    mean: float
    peak: int


def event(command: Command, now: float) -> bytes:
    """One command as a server-sent event; `now` is wall-clock seconds."""
    return b"data: " + _encode(fields(command, now)) + b"\n\n"


def fields(command: Command, now: float) -> dict[str, Any]:
    """The keys that a dashboard insists on, in their order. None of them may be missing, and only one null."""
    meter, counts, fallbacks = command.meter, command.counts, command.fallbacks
    circuit, outstanding = meter.circuit, meter.outstanding
    enabled = isinstance(meter.policy.breaker, Breaker)
    settings = circuit.settings if circuit and enabled else Breaker()
    closed = circuit is None or circuit.state == "closed"
    refused = counts[REFUSED] if settings.count_refusals else 0
    errors = counts[FAILURE] + counts[TIMEOUT] + refused
    requests = counts[SUCCESS] + counts[SLOW] + errors
    unanswered = counts[FAILURE] + counts[TIMEOUT] + counts[SHORT_CIRCUITED] + counts[REFUSED]
    limit = outstanding.limit if outstanding else UNLIMITED
    timeout = _milliseconds(meter.policy.timeout or 0.0)
    latency = dict(
        zip(PERCENTILES, map(_milliseconds, percentiles(command.latencies, list(map(float, PERCENTILES)))), strict=True)
    )
    return {
        "type": "HystrixCommand",
        "name": command.name,
        "group": command.group,
        "currentTime": _milliseconds(now),
        "isCircuitBreakerOpen": settings.force_open or not (closed or settings.force_closed),
        "errorPercentage": 100 * errors // requests if requests else 0,
        "errorCount": errors,
        "requestCount": requests,
        "rollingCountBadRequests": counts[ANSWERED],
        "rollingCountCollapsedRequests": 0,
        "rollingCountEmit": 0,
        "rollingCountExceptionsThrown": max(0, unanswered - fallbacks["success"]),
        "rollingCountFailure": counts[FAILURE],
        "rollingCountFallbackEmit": 0,
        "rollingCountFallbackFailure": fallbacks["failure"],
        "rollingCountFallbackMissing": fallbacks["missing"],
        "rollingCountFallbackRejection": fallbacks["rejected"],
        "rollingCountFallbackSuccess": fallbacks["success"],
        "rollingCountResponsesFromCache": 0,
        "rollingCountSemaphoreRejected": counts[REFUSED],
        "rollingCountShortCircuited": counts[SHORT_CIRCUITED],
        "rollingCountSuccess": counts[SUCCESS] + counts[SLOW],
        "rollingCountThreadPoolRejected": 0,
        "rollingCountTimeout": counts[TIMEOUT],
        "currentConcurrentExecutionCount": outstanding.busy if outstanding else 0,
        "rollingMaxConcurrentExecutionCount": command.peak,
        "latencyExecute_mean": _milliseconds(command.mean),
        "latencyExecute": latency,
        "latencyTotal_mean": _milliseconds(command.mean),
        "latencyTotal": latency,
        "propertyValue_circuitBreakerRequestVolumeThreshold": settings.min_calls,
        "propertyValue_circuitBreakerSleepWindowInMilliseconds": _milliseconds(settings.open_for),
        "propertyValue_circuitBreakerErrorThresholdPercentage": round(100 * settings.error_rate),
        "propertyValue_circuitBreakerForceOpen": settings.force_open,
        "propertyValue_circuitBreakerForceClosed": settings.force_closed,
        "propertyValue_circuitBreakerEnabled": enabled,
        "propertyValue_executionIsolationStrategy": "SEMAPHORE",
        "propertyValue_executionIsolationThreadTimeoutInMilliseconds": timeout,
        "propertyValue_executionTimeoutInMilliseconds": timeout,
        "propertyValue_executionIsolationThreadInterruptOnTimeout": True,
        "propertyValue_executionIsolationThreadPoolKeyOverride": None,
        "propertyValue_executionIsolationSemaphoreMaxConcurrentRequests": limit,
        "propertyValue_fallbackIsolationSemaphoreMaxConcurrentRequests": CONCURRENT,
        "propertyValue_metricsRollingStatisticalWindowInMilliseconds": 1000 * ROLLING,
        "propertyValue_requestCacheEnabled": False,
        "propertyValue_requestLogEnabled": False,
        "reportingHosts": 1,
        "threadPool": command.group,
    }


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


_encode = msgspec.json.Encoder().encode
