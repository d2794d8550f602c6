from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.testing.wire import BadRequest, Headers, RecordedRequest, RequestParser, encode_chunk, encode_head

SIMPLE = b"GET /v1/models?page=2 HTTP/1.1\r\nHost: test\r\n\r\n"
SIZED = b'POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"a": 42}'
CHUNKED = (
    b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b'4;name=value\r\n{"a"\r\nA\r\n: "\r\n\r\n \r\n\r\n1\r\n"\r\n0\r\nTrailer: yes\r\n\r\n'
)


def parse(*pieces: bytes) -> list[RecordedRequest]:
    parser = RequestParser()
    requests = []
    for piece in pieces:
        parser.feed(piece)
        while (request := parser.next_request()) is not None:
            requests.append(request)
    return requests


def test_a_request_without_a_body() -> None:
    (request,) = parse(SIMPLE)
    assert (request.method, request.path, request.query, request.body) == ("GET", "/v1/models", "page=2", b"")
    assert request.headers["host"] == request.headers["HOST"] == "test"


def test_a_body_with_a_length() -> None:
    (request,) = parse(SIZED)
    assert request.body == b'{"a": 42}'
    assert request.json == request.fields == {"a": 42}


def test_a_body_in_chunks() -> None:
    (request,) = parse(CHUNKED)
    assert request.body == b'{"a": "\r\n\r\n \r\n"'


@given(cuts=st.lists(st.integers(0, len(SIMPLE + SIZED + CHUNKED + SIMPLE)), max_size=12))
def test_requests_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    data = SIMPLE + SIZED + CHUNKED + SIMPLE
    edges = [0, *sorted(cuts), len(data)]
    requests = parse(*(data[start:end] for start, end in itertools.pairwise(edges)))
    assert [request.path for request in requests] == [
        "/v1/models",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
    ]
    assert [len(request.body) for request in requests] == [0, 9, 15, 0]


def test_empty_lines_between_requests_are_ignored() -> None:
    assert len(parse(SIZED + b"\r\n\r\n" + SIMPLE)) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nName : value\r\n\r\n",
        b"GET / HTTP/1.1\r\nName: value\r\n folded\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1f\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"x" * 300_000,
        b"GET / HTTP/1.1\r\n" + b"Name: value\r\n" * 30_000,
    ],
)
def test_bytes_that_are_not_a_request_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(data)


@pytest.mark.parametrize("framing", [b"Content-Length: 6\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch, framing: bytes) -> None:
    monkeypatch.setattr("lmbridge.testing.wire.MAX_BODY", 5)
    with pytest.raises(BadRequest):
        parse(b"POST / HTTP/1.1\r\n" + framing + b"3\r\nabc\r\n" * 2)


@pytest.mark.parametrize(
    ("version", "fields", "asks"),
    [
        ("HTTP/1.1", [], False),
        ("HTTP/1.1", [("Connection", "keep-alive")], False),
        ("HTTP/1.1", [("connection", "Close")], True),
        ("HTTP/1.0", [], True),
    ],
)
def test_a_request_can_ask_for_the_connection_to_be_closed(
    version: str, fields: list[tuple[str, str]], asks: bool
) -> None:
    request = RecordedRequest(method="GET", path="/", version=version, headers=Headers(fields))
    assert request.asks_to_close is asks


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b"null"])
def test_a_body_that_is_not_an_object_has_no_fields(body: bytes) -> None:
    assert RecordedRequest(method="POST", path="/", body=body).fields == {}


def test_header_fields_are_looked_up_in_any_case_and_joined() -> None:
    headers = Headers([("Accept", "a"), ("accept", "b"), ("X-Key", "k")])
    assert headers["ACCEPT"] == "a, b"
    assert "x-KEY" in headers
    assert headers.get("absent") is None
    assert dict(headers) == {"accept": "a, b", "x-key": "k"}


def test_a_head_names_its_status_if_it_is_registered() -> None:
    assert encode_head(404, {"A": "b"}) == b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\n"
    assert encode_head(529, {}) == b"HTTP/1.1 529 \r\n\r\n"


def test_a_chunk_begins_with_its_length() -> None:
    assert encode_chunk(json.dumps("x" * 30).encode()) == b'20\r\n"' + b"x" * 30 + b'"\r\n'
    assert encode_chunk(b"") == b"0\r\n\r\n"
