"""The work behind async requests: a submission is handled, its answer kept, collected and cancelled from anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from quintet.binding import Bound, bind
from quintet.clock import Clock
from quintet.contract import LONGEST_WAIT, Fault, Operation
from quintet.delivery import HandlerFailed, Redelivery, decide, is_cancelled
from quintet.errors import CallError, Cancelled, UnknownPending
from quintet.message import Handler, Message
from quintet.store import AnswerStore, Kept
from quintet.transport import DONE, Again, Receive, Verdict

Failing = Callable[[Exception, Message, Operation[Any, Any, Any]], Fault | CallError]
Refuse = Callable[[Bound, Message, Fault | CallError, Operation[Any, Any, Any]], Message]


class StillPending(Exception):
    """Not an error: there is no answer yet."""


class PendingWork:
    """The async requests of one running service, over one answer store that its instances share."""

    def __init__(self, store: AnswerStore, clock: Clock) -> None:
        self.store = store
        self._clock = clock
        self._work: dict[str, asyncio.Task[Message | None]] = {}  # what is worked on in this process, by id
        self._looking: set[asyncio.Future[Kept | None]] = set()  # those who wait for an answer here
        self._draining = False

    def __repr__(self) -> str:
        return f"<pending work: {len(self._work)} in work, {len(self._looking)} waited for>"

    def worker(
        self,
        operation: Operation[Any, Any, Any],
        handle: Handler,
        bound: Bound,
        redelivery: Redelivery,
        failing: Failing,
        refuse: Refuse,
    ) -> Receive:
        """Works on a submission: its value, or at last its failure, is the answer. `failing`: what of it may travel;
        `refuse` writes that as an answer."""

        async def work(message: Message) -> Verdict:
            kept = await self.store.get(message.id)
            if kept is not None and kept.state != "pending":
                return DONE  # a repeat of what is answered, or was cancelled before it was begun
            task = self._work[message.id] = asyncio.ensure_future(handle(message))
            try:
                answer = await self._result_of(task, message.id)
                if answer is None:
                    return DONE
            except Exception as error:
                failure = failing(error, message, operation)
                verdict = decide(error, message.attempt, redelivery, self._clock)
                if isinstance(verdict, Again) and not isinstance(failure, Fault):
                    return verdict
                answer = refuse(bound, message, failure, operation)
            finally:
                self._work.pop(message.id, None)
            await self.store.answer(message.id, answer)
            return DONE

        async def receive(message: Message) -> Verdict:
            try:
                return await work(message)
            except Exception as error:  # the store failed
                failing(error, message, operation)
                return decide(error, message.attempt, redelivery, self._clock)

        return receive

    async def _result_of(self, task: asyncio.Task[Message | None], id: str) -> Message | None:  # noqa: A002
        """The reply of a handler; None where the work was withdrawn, as the store says. Raises what the handler did."""
        try:
            return await task
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            kept = await self.store.get(id)
            if kept is not None and kept.state == "cancelled":
                return None
            raise HandlerFailed(error) from None

    def companions(
        self, operation: Operation[Any, Any, Any], direct: bool
    ) -> tuple[Callable[..., Awaitable[Any]], Callable[..., Awaitable[None]]]:
        """The handlers of `result` and `cancel`. `direct`: a submission was kept before it was accepted, so that an
        unknown id is a mistake; over a queue it may still be on its way."""
        inside = bind("body", operation)
        unknown = f"{operation.full_name}: no pending answer %r: never submitted, or kept no longer"

        async def result(id: str, wait: float) -> Any:  # noqa: A002 - the name on the wire
            if not direct:
                await self.store.accept(id)
            kept = await self._look(id, min(max(wait, 0.0), LONGEST_WAIT))
            if kept is None:
                raise UnknownPending(unknown % id)
            if kept.state == "cancelled":
                raise Cancelled(f"{operation.full_name}: {id} was cancelled")
            if kept.reply is None:
                raise StillPending
            failure = inside.failure(kept.reply)
            if failure is not None:
                raise failure
            return inside.result(kept.reply)

        async def cancel(id: str) -> None:  # noqa: A002 - the name on the wire
            if direct and await self.store.get(id) is None:
                raise UnknownPending(unknown % id)
            if await self.store.cancel(id) and id in self._work:
                self._work[id].cancel()

        return result, cancel

    async def _look(self, pending_id: str, wait: float) -> Kept | None:
        """What is known of an answer after at most so many seconds, and at once when the service drains."""
        looking = asyncio.ensure_future(self.store.get(pending_id, 0.0 if self._draining else wait))
        self._looking.add(looking)
        try:
            return await looking
        except asyncio.CancelledError:
            if not self._draining or is_cancelled():
                raise
            return await self.store.get(pending_id)
        finally:
            self._looking.discard(looking)

    def drain(self) -> None:
        """Answers all who wait here with what is known, so that they hold up no stop."""
        self._draining = True
        for looking in self._looking:
            looking.cancel()
