"""`forbid_real_requests` and `retry_without_waiting`: what a test suite switches on for all its tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from lmbridge.config import normalize_api_base
from lmbridge.testing.scripted_server import running_origins
from lmbridge.transport.http_interface import HttpRequest, HttpResponse
from lmbridge.transport.interception import Send, interceptors
from lmbridge.transport.retry import WaitScale


class RealRequestError(RuntimeError):
    """A program under test has sent a request to a real server, which `forbid_real_requests` forbids.

    It is not an `LLMError`, so that code which handles the failures of servers does not hide it.
    """


@contextmanager
def forbid_real_requests(allow: Sequence[str] = ()) -> Iterator[None]:
    """Makes every request over a socket raise a `RealRequestError`, except those to servers of `lmbridge.testing`.

    ::

        @pytest.fixture(autouse=True)
        def no_real_requests():
            with forbid_real_requests():
                yield

    The rule holds for all clients in this process, including those that are open already. A `ScriptedServer`, a
    `OneModelServer` or a `FaultProxy` that runs in this process stays allowed, and so does what needs no socket:
    `MockTransport`, `FakeChatClient`, and a `Cassette` that is opened inside the block, even if it records. Other
    servers on the loopback interface are refused, because that is where real models run. MCP servers are not affected.

    Args:
        allow: The `api_base` of further servers that may be asked, such as that of a `LocalServer`.

    Raises:
        LLMValidationError: An item of `allow` is not a URL.
    """
    allowed = {_origin(normalize_api_base(url)) for url in allow}

    async def refuse(request: HttpRequest, send: Send) -> HttpResponse:
        origin = _origin(request.url)
        if origin in allowed or origin in running_origins:
            return await send(request)
        raise RealRequestError(
            f"{request.method} {origin}{urlsplit(request.url).path} would go to a real server, which"
            " forbid_real_requests() does not allow; use a double from lmbridge.testing, or pass allow=[api_base]"
        )

    interceptors.append(refuse)
    try:
        yield
    finally:
        interceptors.remove(refuse)


@contextmanager
def retry_without_waiting() -> Iterator[None]:
    """Removes the wait before each retry, so that tests of retries take no time.

    The number of retries, and which failures are retried, stay the same. This applies to all clients in this process,
    to the waits that `Retry-After` asks for, and to the polls of a server that is loading.
    """
    before, WaitScale.factor = WaitScale.factor, 0.0
    try:
        yield
    finally:
        WaitScale.factor = before


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
