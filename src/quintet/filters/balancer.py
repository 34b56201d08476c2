"""The balancer: one of several instances for each attempt, and none that keeps failing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from quintet.clock import Clock
from quintet.filter import Guarded
from quintet.message import Handler, Message
from quintet.outcome import ANSWERED, FAILURE, SUCCESS, TIMEOUT, outcome_of

PLACE = 60  # above the time-out: an instance that hangs must count as one that failed

FAILURES = 5  # in a row, then an instance is ejected; one that comes back and fails once more is ejected again
EJECTED_FOR = 5.0  # seconds, twice as long each time it happens again
LONGEST = 300.0


class Instance:
    """One address of a service, as the balancer knows it."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.failures = 0  # in a row
        self.ejections = 0  # in a row
        self.back_at = 0.0

    def __repr__(self) -> str:
        ejected = f", ejected until {self.back_at:g}" if self.ejections else ""
        return f"<instance, {self.outstanding} outstanding, {self.failures} failures in a row{ejected}>"


class Balancer:
    """Power of two choices: of two by chance the one with fewer outstanding requests; at most half are ejected."""

    def __init__(self, clock: Clock, count: int = 0) -> None:
        self.instances = [Instance() for _ in range(count)]
        self._names: Sequence[Hashable] = range(count)
        self._clock = clock

    def __repr__(self) -> str:
        return f"<balancer of {self.instances}>"

    def among(self, names: Sequence[Hashable]) -> list[Instance]:
        """The instances of these names from now on; what is known of those that stay is not forgotten."""
        known = dict(zip(self._names, self.instances, strict=True))
        self._names, self.instances = names, [known.get(name) or Instance() for name in names]
        return self.instances

    def choose(self, instances: Sequence[Instance]) -> int:
        """The index of the instance that the next attempt goes to."""
        now, chance = self._clock.now(), self._clock.random
        able = [index for index, instance in enumerate(instances) if instance.back_at <= now]
        able = able or list(range(len(instances)))  # those that were not ejected have left
        if len(able) == 1:
            return able[0]
        one, other = chance.sample(able, 2)
        return min(one, other, key=lambda index: instances[index].outstanding)

    def settle(self, instance: Instance, outcome: int) -> None:
        """Takes in how an attempt with the instance ended."""
        if outcome in (SUCCESS, ANSWERED):
            instance.failures = instance.ejections = 0
        elif outcome in (FAILURE, TIMEOUT):
            instance.failures += 1
            now = self._clock.now()
            out = sum(other.back_at > now for other in self.instances)
            if instance.back_at <= now and instance.failures >= FAILURES and 2 * (out + 1) <= len(self.instances):
                instance.back_at = now + min(LONGEST, EJECTED_FOR * 2.0 ** min(instance.ejections, 64))
                instance.ejections += 1


def balance(guarded: Guarded, handlers: Sequence[Handler]) -> Handler:
    """One handler out of those of all instances."""
    balancer = guarded.own.of(Balancer, lambda: Balancer(guarded.clock))
    instances = balancer.among(guarded.instances or range(len(handlers)))

    async def balanced(message: Message) -> Message | None:
        index = balancer.choose(instances)
        instance = instances[index]
        instance.outstanding += 1
        try:
            reply = await handlers[index](message)
        except BaseException as error:
            balancer.settle(instance, outcome_of(error, message))
            raise
        finally:
            instance.outstanding -= 1
        balancer.settle(instance, SUCCESS)
        return reply

    return balanced
