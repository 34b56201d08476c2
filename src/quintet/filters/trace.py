"""OpenTelemetry spans by its conventions for RPC and messaging, their context in the W3C headers of each message.

A chain is built without this filter where no tracer provider is configured by then: no span, and no cost.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from quintet.contract import Fault, Operation, Style
from quintet.delivery import HandlerFailed
from quintet.errors import CallError, Declined
from quintet.filter import Guarded
from quintet.message import Handler, Message

if TYPE_CHECKING:
    from typing import Any

    from opentelemetry.trace import Span, Tracer

PLACE = 10  # outermost of what is done for a call: its retries and refusals are events of its span

SYSTEM = "quintet"


def client(guarded: Guarded, handler: Handler) -> Handler:
    tracer = _tracer()
    if tracer is None or guarded.operation.parent:  # to wait for a pending answer is polling, and no step of a trace
        return handler
    from opentelemetry import trace
    from opentelemetry.propagate import inject

    operation = guarded.operation
    rpc = operation.style is Style.REQUEST  # all others are handed over: a producer's span, and a consumer's
    kind = trace.SpanKind.CLIENT if rpc else trace.SpanKind.PRODUCER
    name, attributes = _described(operation, "send")
    if guarded.where:
        attributes["server.address"] = guarded.where

    async def traced(message: Message) -> Message | None:
        with tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            if not rpc:
                span.set_attribute("messaging.message.id", message.id)
            inject(message.headers)
            try:
                return await handler(message)
            except BaseException as error:
                _failed(span, error, rpc)
                raise

    return traced


def server(guarded: Guarded, handler: Handler) -> Handler:
    tracer = _tracer()
    if tracer is None or guarded.operation.parent:  # to wait for a pending answer is polling, and no step of a trace
        return handler
    from opentelemetry import trace
    from opentelemetry.propagate import extract

    operation = guarded.operation
    rpc = operation.style is Style.REQUEST
    kind = trace.SpanKind.SERVER if rpc else trace.SpanKind.CONSUMER
    name, attributes = _described(operation, "process")
    if not rpc:
        attributes["messaging.consumer.group.name"] = guarded.watch.owner

    async def traced(message: Message) -> Message | None:
        with tracer.start_as_current_span(
            name,
            context=extract(message.headers),
            kind=kind,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            if not rpc:
                span.set_attribute("messaging.message.id", message.id)
                if message.attempt > 1:
                    span.set_attribute("messaging.message.delivery_attempt", message.attempt)
            try:
                return await handler(message)
            except BaseException as error:
                _failed(span, error, rpc)
                raise

    return traced


def _tracer() -> Tracer | None:
    """The configured provider's tracer: where nobody has imported OpenTelemetry or named a provider, there is none."""
    if "opentelemetry.trace" not in sys.modules and "OTEL_PYTHON_TRACER_PROVIDER" not in os.environ:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return trace.get_tracer("quintet", schema_url="https://opentelemetry.io/schemas/1.40.0")


def _described(operation: Operation[Any, Any, Any], verb: str) -> tuple[str, dict[str, str]]:
    """The name and attributes of an operation's spans."""
    contract, _, method = operation.full_name.partition(".")
    if operation.style is Style.REQUEST:
        name = f"{contract}/{method}" if method else contract
        return name, {"rpc.system.name": SYSTEM, "rpc.method": name}
    return f"{verb} {operation.full_name}", {
        "messaging.system": SYSTEM,
        "messaging.operation.name": verb,
        "messaging.operation.type": verb,
        "messaging.destination.name": operation.full_name,
    }


def _failed(span: Span, error: BaseException, rpc: bool) -> None:
    """A declared fault is an answer, and so is a declined survey: their names are noted, the span did not fail."""
    from opentelemetry.trace import StatusCode

    cause = error.error if isinstance(error, HandlerFailed) else error
    if rpc:
        code = cause.code if isinstance(cause, CallError) else type(cause).__name__
        span.set_attribute("rpc.response.status_code", code)
    if isinstance(cause, Fault | Declined):
        return
    span.set_attribute("error.type", type(cause).__qualname__)
    span.set_status(StatusCode.ERROR, str(cause))
    if isinstance(error, HandlerFailed):  # raised here; what another service raised is recorded there
        span.record_exception(cause)
