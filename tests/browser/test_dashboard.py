"""The dashboard in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from quintet import Breaker, Contract, Policy, Redelivery, Service, connect, event, notification, request, serve
from quintet.dashboard.collector import Collector
from quintet.dashboard.site import serve_dashboard

CHROMIUM = shutil.which("chromium") or ""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WRONG = "<img src=x onerror=\"document.title='broken'\">"  # as the name of a caller: it comes from outside

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    CHROMIUM = ""
if not CHROMIUM:
    if os.environ.get("CI"):
        raise RuntimeError("CI must test the dashboard in a browser: run scripts/browser, it installs chromium")
    pytest.skip("no chromium or no playwright here: scripts/browser installs chromium", allow_module_level=True)


class Passengers(Contract, name="passengers"):
    @request
    async def get(self, passenger_id: str) -> str: ...

    @notification
    async def seen(self, passenger_id: str) -> None: ...


class Trips(Contract, name="trips"):
    @request
    async def create(self, passenger_id: str) -> str: ...

    @event
    async def created(self, trip_id: str) -> None: ...


class World:
    """Three services under load, their dashboard, and a loop in a thread: the test's own thread drives the browser."""

    def __init__(self) -> None:
        self.page = ""
        self.broken = True
        self.seen: list[str] = []
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> World:
        self._thread.start()
        self._ready.wait(30)
        assert self.page, self.failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            self.failure = error
        finally:
            self._loop.close()
            self._ready.set()

    async def _live(self) -> None:
        registry = Service(Passengers, redelivery=Redelivery(attempts=1))
        desk = Service(Trips)
        billing = Service(name="billing")
        passengers = desk.uses(Passengers, policy=Policy(breaker=Breaker(min_calls=5)))

        @registry.handles(Passengers.get)
        async def get(passenger_id: str) -> str:
            return passenger_id

        @registry.handles(Passengers.seen)
        async def seen(passenger_id: str) -> None:
            if self.broken:
                raise ConnectionError("the database is gone")
            self.seen.append(passenger_id)

        @desk.handles(Trips.create)
        async def create(passenger_id: str) -> str:
            found = await passengers.get(passenger_id)
            await desk.publish(Trips.created, f"t-{found}")
            return found

        @billing.handles(Trips.created)
        async def created(trip_id: str) -> None:
            pass

        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        bus, observe = "memory://browser", f"http://127.0.0.1:{port}"
        links = {"passengers": bus, "trips": bus}
        async with (
            serve(registry, desk, billing, at=bus, connect=links, observe=observe),
            connect(Trips, bus, name="website") as trips,
            connect(Passengers, bus, name=WRONG) as strange,
            Collector([observe]) as collector,
            serve_dashboard(collector) as page,
        ):
            await strange.seen("p-1")

            async def load() -> None:
                while True:
                    for call in (trips.create("p-1"), strange.get("p-1")):
                        with contextlib.suppress(Exception):  # it goes on, whatever is clicked
                            await call
                    await asyncio.sleep(0.02)

            loading = asyncio.create_task(load())
            self.page = page
            self._ready.set()
            await self._stop.wait()
            loading.cancel()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as there:
        yield there


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@contextmanager
def opened(browser: Browser, world: World, width: int = 1280, **more: Any) -> Iterator[Page]:
    """A page; nothing on it may fail, and nothing may be asked of anyone but the dashboard."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **more)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith((world.page, "data:")) else complaints.append(f"asked for {asked.url}")
        ),
    )
    page.goto(world.page)
    expect(page.locator("#live")).to_have_text("live", timeout=20_000)
    yield page
    context.close()
    assert not complaints


def test_the_map_shows_who_calls_whom_and_how_often(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        nodes = page.locator("#map .node .name")
        for name in ("website", "trips", "passengers", "billing"):
            expect(nodes.filter(has_text=name)).to_have_count(1)
        expect(page.locator("#map .edge .said").filter(has_text="/s").first).to_be_visible(timeout=20_000)
        expect(page.locator("#map title").filter(has_text="website → trips: trips.create")).to_have_count(1)
        expect(page.locator("#map title").filter(has_text="trips → billing: trips.created")).to_have_count(1)
        page.locator("#map .node").filter(has_text="billing").click()
        expect(page.locator("[data-call='trips passengers.get']")).to_have_count(0)
        page.get_by_role("button", name="Show all, not only billing").click()
        expect(page.locator("[data-call='trips passengers.get']")).to_have_count(1)


def test_a_call_has_its_minute_percentiles_breaker_and_bulkhead(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        card = page.locator("[data-call='trips passengers.get']")
        expect(card.locator(".figures div").first).to_contain_text("/s")
        expect(card.locator(".chart .ok")).to_have_attribute("d", re.compile("^M"), timeout=20_000)
        expect(card).to_contain_text("failed in 10 s; opens at 50 % of 5 or more")
        expect(card).to_contain_text("of 1,000 outstanding")
        expect(page.locator("[data-handler='passengers passengers.get']")).to_contain_text("of 1,000")


def test_a_circuit_is_opened_and_left_to_itself_again_by_hand(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        card = page.locator("[data-call='trips passengers.get']")
        card.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_have_text("trips: the circuit of passengers.get is held open")
        expect(card.locator(".pill-h")).to_have_text("held open", timeout=10_000)
        expect(page.locator("#map .pill text").filter(has_text="open").first).to_be_visible(timeout=10_000)
        card.get_by_role("button", name="Auto").click()
        expect(card.locator(".pill-h")).to_have_text("closed", timeout=10_000)


def test_a_dead_letter_is_replayed(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        letter = page.locator("[data-letter]")
        expect(letter).to_contain_text("passengers.seen", timeout=20_000)
        expect(letter).to_contain_text("ConnectionError")
        world.broken = False
        letter.get_by_role("button", name="Replay").click()
        expect(page.get_by_role("alert")).to_contain_text("1 of 1 dead letters replayed")
        expect(letter).to_have_count(0, timeout=10_000)
        assert world.seen == ["p-1"]


def test_the_newest_messages_are_a_sequence_diagram_that_can_be_held(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        expect(page.locator("#drawing svg .name").filter(has_text="trips").first).to_be_visible(timeout=20_000)
        expect(page.locator("#drawing svg .label").filter(has_text="create").first).to_be_visible()
        page.get_by_role("button", name="Hold").click()
        expect(page.get_by_role("button", name="Go on")).to_be_visible()
        drawn = page.locator("#drawing svg desc").text_content()
        page.wait_for_function("at => latest.at > at + 2", arg=page.evaluate("latest.at"))
        assert page.locator("#drawing svg desc").text_content() == drawn


def test_what_a_foreign_name_holds_is_shown_and_not_run(world: World, browser: Browser) -> None:
    with opened(browser, world) as page:
        expect(page.locator("#map .node title").filter(has_text="onerror")).to_have_count(1)
        expect(page.locator("#map .node .name").filter(has_text="<img")).to_have_count(1)
        expect(page).to_have_title("Quintet")
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_screen_and_a_phone_in_light_and_dark(
    world: World, browser: Browser, width: int, scheme: str
) -> None:
    with opened(browser, world, width, color_scheme=scheme) as page:
        expect(page.locator("#map .node").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.evaluate(
            "[...document.querySelectorAll('#map .node')].map(n => n.getBoundingClientRect()).map(r => [r.x, r.right])"
        )
        assert all(left >= 0 and right <= width for left, right in boxes)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, paper[4:-1].split(",")))
        assert (brightness > 600) is (scheme == "light")
