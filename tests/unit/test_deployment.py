"""A deployment file is read as it was meant, or refused in one sentence that names file, table and key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from quintet.deployment import Deployed, Deployment, Guarding, read_deployment
from quintet.errors import ConfigurationError
from quintet.policy import Policy


def read(folder: Path, text: str, environment: Mapping[str, str] | None = None) -> Deployment:
    file = folder / "quintet.toml"
    file.write_text(text)
    return read_deployment(file, environment or {})


def test_a_whole_table_is_read_with_all_its_keys(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [service.trips]
        app = "rides.trips:service"
        at = ["http://127.0.0.1:8002", "sqlite:///rides.db"]
        connect = { passengers = "http://127.0.0.1:8001", dispatch = ["sqlite:///a.db", "sqlite:///b.db"] }
        format = "msgpack"
        record = "record.jsonl"
        observe = "http://127.0.0.1:9002"
        env = { LANG = "C" }
        instances = 1
        policy.passengers = { timeout = 0.3, get = { retry = false } }
        """,
    )
    assert found == Deployment(
        {
            "trips": Deployed(
                app="rides.trips:service",
                at=("http://127.0.0.1:8002", "sqlite:///rides.db"),
                connect={"passengers": ("http://127.0.0.1:8001",), "dispatch": ("sqlite:///a.db", "sqlite:///b.db")},
                format="msgpack",
                record="record.jsonl",
                observe="http://127.0.0.1:9002",
                env={"LANG": "C"},
                policy={"passengers": Guarding(Policy(timeout=0.3), {"get": Policy(retry=False)})},
            )
        },
        tmp_path.resolve(),
        tmp_path.resolve() / "quintet.toml",
    )


def test_services_keep_the_order_of_the_file(tmp_path: Path) -> None:
    tables = "".join(f'[service.{name}]\napp = "m:{name}"\n' for name in ("zoe", "adam", "mia"))
    assert list(read(tmp_path, tables).services) == ["zoe", "adam", "mia"]


def test_strings_take_values_from_the_environment_and_their_default_where_it_has_none(tmp_path: Path) -> None:
    text = """
    [service.a]
    app = "${PACKAGE}.a:service"
    at = "http://127.0.0.1:${PORT:-8001}"
    connect.b = "http://127.0.0.1:${OTHER_PORT:-8002}/$${left}"
    env.EMPTY = "${NOTHING:-}"
    """
    service = read(tmp_path, text, {"PACKAGE": "rides", "PORT": "9001"}).services["a"]
    assert service.app == "rides.a:service"
    assert service.at == ("http://127.0.0.1:9001",)
    assert service.connect == {"b": ("http://127.0.0.1:8002/${left}",)}
    assert service.env == {"EMPTY": ""}


REFUSED = {
    "app = 'm:a'\natt = 'sqlite:///a.db'": "[service.a]: unknown key 'att'; did you mean 'at'?",
    "app = 'm:a'\nzzz = 1": "[service.a]: unknown key 'zzz'; known are app, at,",
    "at = 'sqlite:///a.db'": "[service.a]: app is missing; write app = 'module:service'",
    "app = 'm.a'": "[service.a]: app = 'm.a' must read 'module:service'",
    "app = 5": "[service.a]: app = 5 must be a string",
    "app = 'm:a'\nat = 8001": "[service.a]: at = 8001 must be an address or a list of addresses",
    "app = 'm:a'\nat = ['http://x:1', 3]": "[service.a]: at = 3 must be a string",
    "app = 'm:a'\nat = 'htp://x'": "[service.a]: at: htp://x: unknown scheme 'htp'",
    "app = 'm:a'\nat = '127.0.0.1:8001'": "[service.a]: at: '127.0.0.1:8001' is no address",
    "app = 'm:a'\nat = 'sqlite:///a.db?leese=3'": "[service.a]: at: sqlite:///a.db?leese=3: unknown option leese",
    "app = 'm:a'\nconnect = 'http://x'": "[service.a]: connect = 'http://x' must be a table",
    "app = 'm:a'\nconnect.b = 'x'": "[service.a]: connect.b: 'x' is no address",
    "app = 'm:a'\nformat = 'jsn'": "[service.a]: format: unknown format 'jsn'",
    "app = 'm:a'\nenv = { A = 1 }": "[service.a]: env.A = 1 must be a string",
    "app = 'm:a'\ninstances = 0": "[service.a]: instances = 0 must be a whole number, 1 or more",
    "app = 'm:a'\ninstances = true": "[service.a]: instances = True must be a whole number",
    "app = 'm:a'\ninstances = 2\nat = 'http://127.0.0.1:8001'": "2 instances cannot all listen at http://127.0.0.1:8001",
    "app = 'm:a'\ninstances = 2\nobserve = 'http://127.0.0.1:9001'": "2 instances cannot all listen at http://127.0.0.1:9",
    "app = 'm:a'\nobserve = 'localhost'": "observe: 'localhost' is no address",
    "app = 'm:a'\nobserve = 3": "observe = 3 must be a string",
    "app = 'm:a'\nrecord = '${HERE}/x'": "record wants the environment variable HERE, which is not set",
}


@pytest.mark.parametrize("table", REFUSED)
def test_what_is_wrong_in_a_table_is_named_with_its_place(tmp_path: Path, table: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, f"[service.a]\n{table}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'quintet.toml'}: [service.a]: ")
    assert REFUSED[table] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[service.a", "is no TOML"),
        ("", "no service; each stands in a table [service.NAME]"),
        ("service = 3", "no service; each stands in a table [service.NAME]"),
        ("[service]\na = 3", "no service; each stands in a table [service.NAME]"),
        ("[services.a]\napp = 'm:a'", "unknown key 'services'; services stand in [service.NAME] tables"),
    ],
)
def test_a_file_that_is_no_deployment_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "quintet.toml") in str(caught.value)
    assert complaint in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no .*nowhere\.toml"):
        read_deployment(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_deployment(tmp_path)
