"""The diagram shows what was recorded, each thing once, in the order of time; whatever the names are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quintet import Contract, Service, serve, survey
from quintet.contract import Style
from quintet.diagram import arrows, participants, svg, text
from quintet.record import Exchange, read


def exchange(style: Style, way: str, operation: str, at: float, **more: Any) -> Exchange:
    sender, _, receiver = way.partition(" > ")
    given = {"id": operation, "attempt": 1, "outcome": "done", "ended": at + 0.25} | more
    return Exchange(
        started=at, sender=sender, receiver=receiver, operation=operation, style=style.value, **given
    )  # fmt: skip


def rows(exchanges: Sequence[Exchange], **options: Any) -> list[str]:
    return [line.rstrip() for line in text(exchanges, **options).plain.splitlines()]


CREATE = exchange(Style.REQUEST, "phone > trips", "trips.create", 10.0)
GET = exchange(Style.REQUEST, "trips > passengers", "passengers.get", 10.1, ended=10.11)
TOLD = exchange(Style.NOTIFICATION, "phone > trips", "trips.pickup_requested", 9.9)


def test_requests_are_answered_by_dashed_replies_in_the_order_of_time() -> None:
    assert rows([GET, CREATE, TOLD], width=70) == [
        "                                     phone      trips   passengers",
        " 0.000 s  trips.pickup_requested       │─────────▷│          │",
        " 0.100 s  trips.create                 │─────────▶│          │",
        " 0.200 s  passengers.get               │          │─────────▶│",
        " 0.210 s    10 ms                      │          │◁╌╌╌╌╌╌╌╌╌│",
        " 0.350 s    250 ms                     │◁╌╌╌╌╌╌╌╌╌│          │",
    ]


def test_a_message_to_several_groups_is_one_arrow() -> None:
    heard = [exchange(Style.EVENT, f"trips > {name}", "trips.created", 1.0) for name in ("dispatch", "billing")]
    assert [(arrow.shape, arrow.targets) for arrow in arrows(heard)] == [("fan-out", ("dispatch", "billing"))]


def test_a_repeat_of_a_message_is_an_arrow_of_its_own() -> None:
    first = exchange(Style.EVENT, "trips > dispatch", "trips.created", 1.0, outcome="NoDriver")
    again = exchange(Style.EVENT, "trips > dispatch", "trips.created", 2.0, attempt=2)
    assert [(arrow.label, arrow.failed) for arrow in arrows([again, first])] == [
        ("trips.created", False),
        ("NoDriver", True),
        ("trips.created (attempt 2)", False),
    ]


@pytest.mark.parametrize(
    ("outcome", "label", "failed"),
    [
        ("done", "250 ms", False),
        ("declined", "declined", True),
        ("late", "too late", True),
        ("DeadlineExceeded", "too late", True),
        ("StillPending", "not yet", False),
        ("NoSuchTrip", "NoSuchTrip", True),
    ],
)
def test_a_reply_says_how_it_ended(outcome: str, label: str, failed: bool) -> None:
    _, reply = arrows([exchange(Style.SURVEY, "dispatch > maria", "dispatch.offers", 1.0, outcome=outcome)])
    assert (reply.shape, reply.source, reply.targets) == ("reply", "maria", ("dispatch",))
    assert (reply.label, reply.failed) == (label, failed)
    drawn = svg([exchange(Style.SURVEY, "dispatch > maria", "dispatch.offers", 1.0, outcome=outcome)])
    assert ('class="reply" style="color: var(--failed)"' in drawn) is failed


def test_an_answer_that_is_kept_is_marked_and_not_sent() -> None:
    asked, kept = arrows([exchange(Style.ASYNC_REQUEST, "phone > billing", "billing.receipt", 1.0)])
    assert (asked.shape, kept.shape, kept.source, kept.label) == ("one-way", "mark", "billing", "answer kept")


def test_the_given_order_of_participants_comes_first_and_the_rest_as_they_appear() -> None:
    assert participants(arrows([CREATE, GET])) == ["phone", "trips", "passengers"]
    head = rows([CREATE, GET], order=["passengers", "nobody", "trips"], width=100)[0]
    assert head.split() == ["passengers", "trips", "phone"]


def test_lines_are_as_wide_as_asked_for_where_the_names_let_them() -> None:
    many = [exchange(Style.REQUEST, f"s{number} > s{number + 1}", "some.operation", number) for number in range(8)]
    for width in (100, 120):
        assert max(len(line) for line in rows(many, width=width)) <= width
    assert rows([CREATE], width=10), "too narrow: drawn all the same"


def test_a_service_may_talk_to_itself() -> None:
    own = exchange(Style.EVENT, "trips > trips", "trips.created", 1.0)
    assert "↺" in rows([own])[-1]
    ElementTree.fromstring(svg([own]))


def test_what_is_drawn_cannot_break_out_of_the_picture_or_the_terminal() -> None:
    evil = '<script>alert("1")</script>\x1b[31m\x00&\ud800'
    drawn = svg([exchange(Style.REQUEST, f"{evil} > trips", f"trips.{evil}", 1.0, outcome=evil)], title=evil)
    root = ElementTree.fromstring(drawn.encode())
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert any("<script>" in (element.text or "") for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "\x1b" not in text([exchange(Style.REQUEST, f"{evil} > trips", evil, 1.0)]).plain


def test_nothing_recorded_is_an_empty_diagram() -> None:
    assert rows([]) == []
    ElementTree.fromstring(svg([]))


def test_the_picture_follows_the_readers_scheme_and_names_everyone_above_and_below() -> None:
    drawn = svg([CREATE, GET])
    assert "@media (prefers-color-scheme: dark)" in drawn
    names = [
        element.text
        for element in ElementTree.fromstring(drawn).findall(".//{*}text")
        if element.get("class") == "name"
    ]
    assert sorted(names) == sorted(["phone", "trips", "passengers"] * 2)


def test_an_answer_that_came_too_late_is_recorded_as_late(tmp_path: Path) -> None:
    class Fleet(Contract, name="fleet"):
        @survey
        async def where(self) -> str: ...  # type: ignore[empty-body]

    fleet, slow = Service(Fleet), Service(name="slow")
    asked, over = asyncio.Event(), asyncio.Event()

    @slow.handles(Fleet.where)
    async def where() -> str:
        asked.set()
        await over.wait()
        return "here, at last"

    async def main() -> None:
        async with serve(fleet, slow, at="memory://", record=str(tmp_path / "record")):
            async with fleet.ask(Fleet.where).within(0.05) as answers:
                assert [answer async for answer in answers] == []
            await asked.wait()
            over.set()

    asyncio.run(main())
    assert [one.outcome for one in read(tmp_path / "record")] == ["late"]
