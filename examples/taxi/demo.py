"""One ride, from the tap on the phone to the receipt: `make demo` runs this.

Every service of the deployment file is started as a process. The story is printed as it happens, from the record that
the services write of what they receive; so is the sequence diagram at the end. Exit codes: 0 the story came to its
end, 1 it did not, 2 a service refused to start, 130 Ctrl-C.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import json, structs
from rich.console import Console
from rich.panel import Panel
from taxi.contracts import Phone, Receipt

from quintet import ConfigurationError, Policy, QuintetError, connect
from quintet.deployment import Deployment, read_deployment
from quintet.diagram import COLOURS, svg, text
from quintet.record import Exchange, read
from quintet.supervisor import Process, State, running

HERE = Path(__file__).resolve().parent
RECORD = "record.jsonl"
PORTS = ["PASSENGERS_PORT", "TRIPS_PORT", "BILLING_PORT", "PHONE_PORT"]
START_LIMIT = 60.0  # seconds
PASSENGER = "passenger"  # who taps on the phone: this program

ORDER = ["phone", "trips", "passengers", "dispatch", "maria", "viktor", "olga", "notification", "billing"]

console = Console(highlight=False, soft_wrap=True)

STORY = {
    ("passengers.get", "passengers"): "Passenger Management said who the passenger is",
    ("trips.pickup_requested", "trips"): "Trip Management was told: a pickup is requested",
    ("trips.create", "trips"): "Trip Management created the trip and published Trip Created",
    ("dispatch.offers", "maria"): "Maria made an offer",
    ("dispatch.offers", "viktor"): "Viktor thought about it",
    ("dispatch.offers", "olga"): "Olga was asked",
    ("trips.created", "dispatch"): "The Dispatcher took the best offer in time and published Driver Proposed",
    ("dispatch.driver_proposed", "trips"): "Trip Management heard who drives",
    ("dispatch.driver_proposed", "notification"): "Passenger Notification heard who drives",
    ("dispatch.driver_proposed", "maria"): "Maria heard that she drives, and drove",
    ("trips.arrived", "trips"): "Trip Management was told: they are there, and published Trip Completed",
    ("trips.completed", "notification"): "Passenger Notification heard that the trip is completed",
    ("phone.show", "phone"): "The phone showed a message",
    ("trips.get", "trips"): "Trip Management told Billing about the trip",
    ("billing.receipt", "billing"): "Billing made the receipt, and keeps it until it is collected",
    ("billing.receipt.result", "billing"): "The phone collected the receipt",
}
"""What it means when a service has dealt with an operation. What is not named here happens without a word."""


class StoryStopped(Exception):
    """One sentence about where the story stopped."""


async def follow(record: Path, over: asyncio.Event) -> AsyncIterator[Exchange]:
    """Each exchange as it is recorded, until all is over and read."""
    decode = json.Decoder(Exchange).decode
    with record.open("a+b") as file:
        file.seek(0)
        line = b""
        while True:
            line += file.readline()
            if line.endswith(b"\n"):
                yield decode(line)
                line = b""
            elif over.is_set():
                return
            else:
                await asyncio.sleep(0.005)


class Teller:
    """Prints the story as it happens, and remembers how far it came."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.last = "the passenger tapped on the phone"

    def tell(self, exchange: Exchange) -> None:
        sentence = STORY.get((exchange.operation, exchange.receiver))
        if sentence is None or exchange.outcome == "StillPending":
            return
        if exchange.outcome == "done":
            self.last, colour = sentence, COLOURS[exchange.style]
        elif exchange.outcome in ("late", "declined"):
            sentence, colour = f"{sentence}: {exchange.outcome.replace('late', 'too late')}", "yellow"
        else:
            sentence, colour = f"{exchange.operation} failed ({exchange.outcome}) and is tried again", "red"
        way = f"{exchange.sender} → {exchange.receiver}"
        console.print(f"[dim]{exchange.ended - self.begun:7.3f} s[/]  [{colour}]{way:<24}[/]  {sentence}")

    def watch(self, process: Process) -> None:
        if process.state is State.CRASHED:
            console.print(f"[red]           {process.name} died; it is started again in {process.delay:g} s[/]")
        elif process.state is State.READY and process.crashes:
            console.print(f"[green]           {process.name} is back[/]")


def deployment(file: Path) -> Deployment:
    """The deployment as it stands in the file, but on free ports, recorded, and with its state in this folder."""
    ports = free_ports()
    found = read_deployment(file, {**os.environ, **ports})
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    services = {
        name: structs.replace(service, record=RECORD, env={**service.env, "PYTHONPATH": path})
        for name, service in found.services.items()
    }
    return Deployment(services, Path.cwd())


def free_ports() -> dict[str, str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    try:
        return {name: str(held.getsockname()[1]) for name, held in zip(PORTS, sockets, strict=True)}
    finally:
        for held in sockets:
            held.close()


async def ride(phone_at: tuple[str, ...], teller: Teller, within: float) -> tuple[Receipt, list[str]]:
    """The passenger's part: tap, ride for at most so many seconds, and look at the phone. Raises StoryStopped."""
    async with connect(Phone, phone_at, name=PASSENGER, policy=Policy(timeout=10.0)) as phone:
        try:
            pending = await phone.ride("p-1", "Station", "Opera")
            return await pending.wait(within), await phone.screen()
        except QuintetError as error:
            raise StoryStopped(f"the story stopped after {teller.last!r}: {error}") from error


def show(receipt: Receipt, screen: list[str], drawing: Path) -> None:
    """The end of the story: the phone, the diagram, and where its file is."""
    bill = f"Receipt: {receipt.driver.title()} to {receipt.destination}, {receipt.total} EUR"
    console.print(Panel.fit("\n".join([*screen, bill]), title="the phone"))
    exchanged = [exchange for exchange in read(RECORD) if exchange.sender != PASSENGER]
    console.print("What was exchanged, from the record:\n", style="bold")
    console.print(text(exchanged, width=min(max(console.width, 100), 120), order=ORDER))
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(svg(exchanged, title="One ride in five interaction styles", order=ORDER))
    console.print(f"The same as a picture: {drawing}")


def to_try(deployed: Deployment, trip_id: str) -> list[str]:
    """Where everything is, and what one may type now."""
    at = {name: service.at[0] for name, service in deployed.services.items() if service.at}
    where = [f"  {name:<12} {address}" for name, address in at.items()]
    if not at["phone"].startswith("http"):
        file = f"sqlite:///{Path.cwd()}/state/taxi.db"
        return [*where, "Try:", f"  (cd {HERE} && quintet call taxi.contracts:Phone.screen --to {file})"]
    body = json.encode({"passenger_id": "p-1", "pickup": "Station", "destination": "Airport"}).decode()
    return [
        *where,
        "Try:",
        f"  curl {at['phone']}/v1/screen",
        f"  curl -i {at['trips']}/v1/trips/{trip_id}",
        f"  curl -i {at['phone']}/v1/rides -H 'Content-Type: application/json' -d '{body}'",
    ]


async def story(file: Path, drawing: Path, within: float, keep: bool, kills: list[str]) -> None:
    """Runs it all, with its state in the current folder. `kills`: as "billing@trips.get" on the command line."""
    teller, deployed, over = Teller(), deployment(file), asyncio.Event()
    for victim in (kill.partition("@")[0] for kill in kills):
        if victim not in deployed.services:
            raise ConfigurationError(f"--kill: there is no service {victim!r} in {file}")
    console.print(f"Starting {len(deployed.services)} services, each its own process ...")
    async with running(deployed, timeout=START_LIMIT, watch=teller.watch) as processes:

        async def tell() -> None:
            async for exchange in follow(Path(RECORD), over):
                teller.tell(exchange)
                for kill in [kill for kill in kills if kill.partition("@")[2] == exchange.operation]:
                    kills.remove(kill)
                    processes[kill.partition("@")[0]].kill()

        console.print("The passenger taps on the phone: from the station to the Opera, please.\n")
        teller.begun = time.time()
        telling = asyncio.create_task(tell())
        try:
            receipt, screen = await ride(deployed.services["phone"].at, teller, within)
        finally:
            over.set()
            await telling
        show(receipt, screen, drawing)
        if keep:
            console.print("\nAll of it runs on, until Ctrl-C:")
            console.print("\n".join(to_try(deployed, receipt.trip_id)))
            await asyncio.Event().wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deployment", type=Path, default=HERE / "quintet.toml", help="where the services run")
    parser.add_argument("--svg", type=Path, default=Path(".quintet/ride.svg"), help="where the diagram is written")
    parser.add_argument("--within", type=float, default=60.0, metavar="SECONDS", help="how long the story may take")
    parser.add_argument("--keep", action="store_true", help="leaves it all running at the end, until Ctrl-C")
    parser.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="SERVICE@OPERATION",
        help="kills (-9) a service once an operation is done, as billing@trips.get; may be repeated",
    )
    return parser.parse_args()


async def main() -> int:
    given = arguments()
    file, drawing = given.deployment.resolve(), given.svg.resolve()
    this, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.cancel)
    try:
        with TemporaryDirectory(prefix="taxi-") as folder, chdir(folder):
            await story(file, drawing, given.within, given.keep, given.kill)
        return 0
    except asyncio.CancelledError:
        return 130
    except (StoryStopped, QuintetError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
