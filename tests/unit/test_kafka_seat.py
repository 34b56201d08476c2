"""A member's name in its Kafka group, and the file that keeps it while its process lives."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path

import pytest

from quintet.transports.kafka.seat import KEPT, SHOWN, Seat


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"quintet-kafka-{os.getuid()}"


def left_behind(folder: Path, group: str, seconds: float) -> tuple[Path, str]:
    """The file and the name of a member that was killed so long ago."""
    before = set(folder.iterdir()) if folder.exists() else set()
    seat = Seat(group)
    (path,) = set(folder.iterdir()) - before
    os.close(seat._file)
    os.utime(path, (time.time() - seconds,) * 2)
    return path, seat.id


def test_a_seat_is_given_to_one_at_a_time(folder: Path) -> None:
    first, second = Seat("trips"), Seat("trips")
    assert first.id != second.id
    first.free()
    second.free()
    assert list(folder.iterdir()) == []


def test_who_comes_in_the_stead_of_a_killed_one_has_its_name_however_late_it_is(folder: Path) -> None:
    path, name = left_behind(folder, "trips", KEPT * 3)
    seat = Seat("trips")
    assert seat.id == name
    assert path.exists()
    seat.free()


def test_what_nobody_came_back_for_in_a_day_is_removed_and_nothing_else(folder: Path) -> None:
    old, _ = left_behind(folder, "gone", KEPT + 1)
    young, _ = left_behind(folder, "restarting", KEPT - 60)
    taken, _ = left_behind(folder, "there", KEPT + 1)
    with taken.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Seat("trips").free()
    assert not old.exists()
    assert young.exists()
    assert taken.exists()


def test_a_seat_that_is_taken_does_not_grow_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seat = Seat("trips")
    (path,) = folder.iterdir()
    os.utime(path, (0, 0))
    seat.hold()
    assert path.stat().st_mtime == 0
    later = time.monotonic() + SHOWN + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    seat.hold()
    assert path.stat().st_mtime > time.time() - 60
    seat.free()
