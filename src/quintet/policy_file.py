"""The policies of a service's calls as its deployment's file says, put in force again whenever that file changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from quintet.client import set_policy
from quintet.clock import SYSTEM, Clock
from quintet.contract import Contract
from quintet.deployment import read_deployment
from quintet.errors import ConfigurationError
from quintet.policy import Policies, resolve
from quintet.server import Service

log = logging.getLogger("quintet.policy")

LOOK_SECONDS = 0.5  # between two looks whether the file has changed


class PolicyFile:
    """What `[service.NAME.policy.CONTRACT]` says for each contract that the service uses, over what its code says.

    `name`: the table, the service's own name unless given. Raises ConfigurationError where the file is wrong.
    """

    def __init__(self, service: Service, path: str | Path, name: str = "") -> None:
        self._service = service
        self._path = Path(path)
        self._name = name or service.name
        self._code = list(service.clients)  # what was there before the file said anything
        self._seen = self._stamp()
        service.clients[:] = self._read()

    def __repr__(self) -> str:
        return f"<policies of {self._name} in {self._path}>"

    async def watch(self, clock: Clock = SYSTEM) -> None:
        """Looks for ever. What is wrong in the file changes nothing, and the log says it."""
        while True:
            await clock.sleep(LOOK_SECONDS)
            stamp = await asyncio.to_thread(self._stamp)
            if stamp != self._seen:
                self._seen = stamp
                self.reload()

    def reload(self) -> bool:
        """Puts in force what the file says now; False where it is wrong: then all stays as it was."""
        try:
            clients = self._read()
        except ConfigurationError as error:
            log.error("%s; the policies that were in force stay", error)  # noqa: TRY400 - one sentence
            return False
        for client, policies in clients:
            set_policy(client, policies)
        log.info("%s: the policies of %s are in force", self._name, self._path)
        return True

    def _read(self) -> list[tuple[Contract, Policies]]:
        services = read_deployment(self._path).services
        if self._name not in services:
            raise ConfigurationError(
                f"{self._path}: there is no [service.{self._name}]; there is {', '.join(services)}"
            )
        place, found = f"{self._path}: [service.{self._name}.policy", dict(services[self._name].policy)
        clients: list[tuple[Contract, Policies]] = []
        for client, code in self._code:
            contract = type(client)
            guarding = found.pop(contract.__quintet__.name, None)
            try:
                policies = guarding.policies(contract) if guarding else []
                before = [code] if not isinstance(code, Sequence) else code
                resolve(contract, both := [*before, *policies])
            except ConfigurationError as error:
                raise ConfigurationError(f"{place}.{contract.__quintet__.name}]: {error}") from None
            clients.append((client, tuple(both)))
        if found:
            used = ", ".join(type(client).__quintet__.name for client, _ in self._code) or "none"
            raise ConfigurationError(f"{place}.{next(iter(found))}]: it uses no such contract; it uses {used}")
        return clients

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino
