"""wire/http.py: routes, and messages as requests and responses, without a socket."""

from __future__ import annotations

import contextlib
import json

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE

from quintet.errors import InvalidMessage, TooLarge, UnknownOperation
from quintet.message import Channel, Message
from quintet.wire.http import (
    MalformedHTTP,
    NotRouted,
    Response,
    ResponseParser,
    Router,
    add_header,
    problem_parts,
    read_headers,
    read_request,
    read_response,
    request_bytes,
    response_parts,
)

CHANNEL = Channel("trips", route="POST /v1/trips")


def router(*routes: str) -> Router[str]:
    made: Router[str] = Router()
    for route in routes:
        made.add(route, route)
    return made


class Reader:
    """What httptools, the other party, reads out of a request."""

    def __init__(self, data: bytes) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""
        self.url = b""
        self.whole = 0
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(data)
        self.method = parser.get_method().decode()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        add_header(self.headers, name, value)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole += 1


# Routes


def test_a_literal_segment_beats_a_parameter_and_a_dead_end_goes_back_to_the_parameter() -> None:
    found = router("GET /trips/{id}", "GET /trips/latest", "GET /trips/{id}/stops", "GET /trips/latest/map")
    assert found.find("GET", "/trips/latest") == ("GET /trips/latest", {})
    assert found.find("GET", "/trips/7") == ("GET /trips/{id}", {":param-id": "7"})
    assert found.find("GET", "/trips/latest/stops") == ("GET /trips/{id}/stops", {":param-id": "latest"})


def test_what_a_dead_end_took_for_a_parameter_is_forgotten() -> None:
    found = router("GET /a/{x}/end", "GET /{y}/{z}/other")
    assert found.find("GET", "/a/1/other")[1] == {":param-y": "a", ":param-z": "1"}


def test_a_parameter_is_percent_decoded_after_the_path_is_split() -> None:
    found = router("GET /files/{name}/{part}")
    assert found.find("GET", "/files/a%2Fb%20c/%C3%BC")[1] == {":param-name": "a/b c", ":param-part": "ü"}


@pytest.mark.parametrize("path", ["/", "", "/trips/", "/trips//stops", "/trips/7/", "/Trips/7", "/trips/7/x"])
def test_what_is_not_quite_a_route_is_not_found(path: str) -> None:
    with pytest.raises(NotRouted) as caught:
        router("GET /trips/{id}", "GET /trips/{id}/stops").find("GET", path)
    assert caught.value.status == 404
    assert isinstance(caught.value.error, UnknownOperation)


def test_a_path_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(NotRouted) as caught:
        router("GET /trips/{id}").find("GET", "/trips/%ff")
    assert caught.value.status == 400


def test_another_method_is_405_and_says_which_there_are() -> None:
    with pytest.raises(NotRouted) as caught:
        router("GET /trips/{id}", "DELETE /trips/{trip}").find("POST", "/trips/7")
    assert (caught.value.status, caught.value.allow) == (405, "DELETE, GET, HEAD, OPTIONS")


def test_head_takes_the_route_of_get() -> None:
    assert router("GET /trips/{id}").find("HEAD", "/trips/7")[1] == {":param-id": "7"}


def test_operations_on_one_path_are_told_apart_by_the_header_and_a_wrong_one_is_told_the_right_ones() -> None:
    found = router("POST /v1#get", "POST /v1#create")
    assert found.find("POST", "/v1", "create")[0] == "POST /v1#create"
    for wrong in ("", "delete"):
        with pytest.raises(NotRouted, match="serves: create, get") as caught:
            found.find("POST", "/v1", wrong)
        assert caught.value.status == 404


@pytest.mark.parametrize(
    "routes",
    [
        ("GET /a", "GET /a"),
        ("GET /a/{x}", "GET /a/{y}"),
        ("POST /a#x", "POST /a#x"),
        ("POST /a#x", "POST /a"),
        ("POST /a", "POST /a#x"),
        ("GET /a/x-{id}",),
        ("GET a",),
        ("get /a",),
        ("/a",),
        ("GET /a b",),
        ("GET /{not a name}",),
    ],
)
def test_a_route_that_is_malformed_or_taken_is_refused(routes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="route"):
        router(*routes)


def test_a_route_that_was_taken_away_is_not_found_and_its_neighbours_are() -> None:
    found = router("GET /a/{x}", "PUT /a/{x}", "POST /b#x", "POST /b#y")
    found.remove("GET /a/{x}")
    found.remove("POST /b#x")
    assert found.find("PUT", "/a/1")[0] == "PUT /a/{x}"
    assert found.find("POST", "/b", "y")[0] == "POST /b#y"
    with pytest.raises(NotRouted) as caught:
        found.find("GET", "/a/1")
    assert caught.value.allow == "OPTIONS, PUT"


@given(st.text(alphabet="/%{}#?ab0é\x00", max_size=40))
def test_no_path_breaks_the_router(path: str) -> None:
    found = router("GET /a/{b}", "GET /a/b/c", "POST /{a}/b#x")
    with contextlib.suppress(NotRouted):
        found.find("GET", path)


# A message as a request


def test_every_field_of_a_message_arrives() -> None:
    sent = Message(
        channel=CHANNEL,
        body=b"{}",
        id="m-1",
        operation="create",
        sender="Zoë",
        media_type="application/json",
        version="1.0",
        key="k",
        reply_to="r",
        correlation_id="c",
        deadline=12.5,
        attempt=3,
        headers={":method": "PUT", ":path": "/v1/trips/7?x=1", "traceparent": "00-1", "X-City": "Zürich 東京"},
    )
    read = Reader(request_bytes(sent, "example.org:80", "/api", 10.0))
    assert (read.method, read.url, read.whole) == ("PUT", b"/api/v1/trips/7?x=1", 1)
    assert read.headers["host"] == "example.org:80"
    got = read_request(CHANNEL, read.headers, read.body, 100.0)
    for field in ("body", "id", "operation", "sender", "media_type", "version", "key", "reply_to", "correlation_id"):
        assert getattr(got, field) == getattr(sent, field), field
    assert (got.deadline, got.attempt) == (102.5, 3)
    assert got.headers["x-city"] == "Zürich 東京"
    assert got.headers["traceparent"] == "00-1"


def test_without_pseudo_headers_a_message_goes_to_its_channels_route_or_name() -> None:
    assert Reader(request_bytes(Message(channel=CHANNEL), "h", "", 0)).url == b"/v1/trips"
    assert Reader(request_bytes(Message(channel=Channel("a b/c")), "h", "", 0)).url == b"/a%20b%2Fc"
    with pytest.raises(InvalidMessage, match="no :path"):
        request_bytes(Message(channel=Channel("x", route="GET /v1/{id}")), "h", "", 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nevil: 1"},
        {"x": "a\nb"},
        {"x": "a\rb"},
        {"x": "a\0b"},
        {"x y": "1"},
        {"x:": "1"},
        {"Content-Length": "7"},
        {":path": "/a b", ":method": "GET"},
        {":path": "/a HTTP/1.1\r\nx: y", ":method": "GET"},
        {":path": "/é", ":method": "GET"},
    ],
)
def test_nothing_can_be_smuggled_into_a_request(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidMessage):
        request_bytes(Message(channel=CHANNEL, headers=headers), "h", "", 0)


@pytest.mark.parametrize("field", ["id", "sender", "key", "operation", "media_type", "correlation_id"])
def test_no_field_can_smuggle_a_line(field: str) -> None:
    with pytest.raises(InvalidMessage):
        request_bytes(Message(channel=CHANNEL, body=b"1", **{field: "a\r\nb: c"}), "h", "", 0)  # type: ignore[arg-type]


def test_framing_headers_of_an_earlier_journey_are_left_behind() -> None:
    old = {"content-length": "999", "transfer-encoding": "chunked", "connection": "close", "host": "other", "x": "1"}
    read = Reader(request_bytes(Message(channel=CHANNEL, body=b"abc", headers=old), "h", "", 0))
    assert read.headers == {"host": "h", "content-length": "3", "x": "1"}


@pytest.mark.parametrize("name", ["quintet-timeout", "quintet-attempt"])
@pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "1e3", "²", "9" * 13])
def test_a_number_that_is_none_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidMessage, match=name.title()):
        read_request(CHANNEL, {name: value}, b"", 0)


def test_a_media_type_loses_its_parameters_and_its_case() -> None:
    assert read_request(CHANNEL, {"content-type": "Application/JSON; charset=utf-8"}, b"", 0).media_type == (
        "application/json"
    )


def test_a_request_without_a_key_gets_an_id_of_its_own() -> None:
    first, second = (read_request(CHANNEL, {}, b"", 0).id for _ in range(2))
    assert first
    assert first != second


def test_a_header_that_stands_twice_is_joined() -> None:
    headers: dict[str, str] = {}
    for name, value in [(b"X-A", b"1"), (b"x-a", b"2"), (b"Cookie", b"a=1"), (b"cookie", b"b=2"), (b"X-L", b"\xfc")]:
        add_header(headers, name, value)
    assert headers == {"x-a": "1, 2", "cookie": "a=1; b=2", "x-l": "ü"}


# A message as a response


def parse(data: bytes, method: str = "GET", *, max_body: int = 1000) -> Response | None:
    parser = ResponseParser(max_body)
    parser.expect(method)
    return parser.feed(data)


def reply(**fields: object) -> Message:
    return Message(channel=CHANNEL, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (None, 204),
        (reply(), 204),
        (reply(body=b"1"), 200),
        (reply(headers={":status": "201"}), 201),
        (reply(status="invalid", body=b"1"), 422),
        (reply(status="invented", body=b"1"), 500),
        (reply(status="invalid", headers={":status": "400"}), 400),
    ],
)
def test_the_status_is_the_bindings_or_what_the_reply_means(message: Message | None, status: int) -> None:
    assert response_parts(message)[0] == status


def test_a_reply_comes_back_as_it_was_sent() -> None:
    sent = reply(body=b"abc", media_type="text/plain", sender="Zoë", version="2.1", headers={"X-City": "Zürich"})
    status, lines, body = response_parts(sent)
    got = read_response(Response(status, read_headers(lines), body), Message(channel=CHANNEL, id="m-1"))
    assert (got.body, got.media_type, got.sender, got.version, got.status) == (b"abc", "text/plain", "Zoë", "2.1", "")
    assert (got.headers["x-city"], got.headers[":status"], got.correlation_id) == ("Zürich", "200", "m-1")
    assert got.headers["content-length"] == "3"


@pytest.mark.parametrize("status", ["204", "304"])
def test_a_response_that_may_have_no_body_has_none(status: str) -> None:
    sent = reply(body=b"abc", media_type="text/plain", headers={":status": status})
    assert response_parts(sent) == (int(status), [], b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nb: c"},
        {"x": "\n"},
        {"x": "\0"},
        {"Content-Length": "9"},
        {"x y": "1"},
        {":status": "100"},
        {":status": "600"},
        {":status": "x"},
    ],
)
def test_nothing_can_be_smuggled_into_a_response(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        response_parts(reply(headers=headers))


@pytest.mark.parametrize("fields", [{"media_type": "a\nb"}, {"sender": "a\rb"}, {"status": "invalid\n"}])
def test_nothing_can_be_smuggled_into_a_response_by_a_field(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        response_parts(reply(body=b"1", **fields))


@given(st.text(max_size=20))
def test_a_header_that_we_let_pass_the_server_writes(value: str) -> None:
    with contextlib.suppress(ValueError):
        for _, line in response_parts(reply(headers={"x": value}))[1]:
            assert not HEADER_VALUE_RE.search(line)


def test_a_problem_says_the_status_it_is_sent_with() -> None:
    status, lines, body = problem_parts(UnknownOperation("no"), 405, (b"allow", b"GET"))
    headers = read_headers(lines)
    assert status == json.loads(body)["status"] == 405
    assert headers["allow"] == "GET"
    assert headers["content-type"] == "application/problem+json"
    assert headers["content-length"] == str(len(body))
    assert headers["quintet-status"] == "unknown-operation"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *[(200, ""), (204, ""), (301, "remote"), (304, "remote"), (307, "remote")],
        *[(400, "invalid"), (418, "remote"), (500, "remote"), (503, "overloaded")],
    ],
)
def test_a_foreign_servers_status_becomes_a_failure_of_ours(status: int, code: str) -> None:
    assert read_response(Response(status, {}, b""), Message(channel=CHANNEL)).status == code


# Parsing responses

WHOLE = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", 200, b"abc", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: 1\r\n\r\n", 200, b"", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 200, b"abc", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", False),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b"", True),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
     200, b"", True),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status", "body", "keep_alive"), WHOLE)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_a_response_is_read_however_it_is_cut(
    data: bytes, status: int, body: bytes, keep_alive: bool, size: int
) -> None:
    parser = ResponseParser(1000)
    for _ in range(2 if keep_alive else 1):
        parser.expect("GET")
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        seen = [parser.feed(piece) for piece in pieces]
        assert seen[:-1] == [None] * (len(pieces) - 1)
        response = seen[-1]
        assert response is not None
        assert (response.status, response.body, response.keep_alive) == (status, body, keep_alive)


def test_the_headers_are_those_of_the_final_response() -> None:
    response = parse(b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: y\r\n\r\na")
    assert response is not None
    assert response.headers == {"content-length": "1", "x": "y"}


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    parser = ResponseParser(1000)
    assert parser.feed(b"HTTP/1.1 200 OK\r\n\r\nab") is None
    assert parser.feed(b"c") is None
    response = parser.finish()
    assert response is not None
    assert (response.body, response.keep_alive) == (b"abc", False)


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc"])
def test_a_response_that_is_cut_off_is_none(data: bytes) -> None:
    parser = ResponseParser(1000)
    assert parser.feed(data) is None
    assert parser.finish() is None


def test_chunks_of_one_byte_and_trailers_are_read() -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 100_000
    response = parse(data + b"0\r\nX-Trailer: 1\r\n\r\n", max_body=100_000)
    assert response is not None
    assert (response.body, "x-trailer" in response.headers) == (b"a" * 100_000, False)


def test_the_answer_to_head_ends_with_its_head_and_the_connection_with_it() -> None:
    response = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", "HEAD")
    assert response is not None
    assert (response.body, response.keep_alive, response.headers["content-length"]) == (b"", False, "5000")


def test_what_follows_a_whole_response_ends_the_connection_and_not_the_answer() -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    for more in (b"garbage", good):
        response = parse(good + more)
        assert response is not None
        assert (response.body, response.keep_alive) == (b"abc", False)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 70_000,
    ],
)
def test_what_is_no_response_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedHTTP):
        parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"a" * 1001,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 1001,
    ],
)
def test_a_body_over_the_limit_is_too_large(data: bytes) -> None:
    with pytest.raises(TooLarge, match="1000"):
        parse(data)


@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", WHOLE[0][0], WHOLE[1][0]]))
def test_arbitrary_bytes_only_ever_raise_what_is_stated(data: bytes, before: bytes) -> None:
    parser = ResponseParser(100)
    with contextlib.suppress(MalformedHTTP, TooLarge):
        parser.feed(before + data)
        parser.finish()
