"""Test doubles: servers on a real socket that reply as a test scripts them, and a transport without a socket.

A mock of the client would be simpler, but it could not show what goes wrong in practice: bytes that are split anywhere,
connections that break, clients that disconnect. So `ScriptedServer` speaks HTTP, and your test uses the real client. If
a test does not depend on the connection, `MockTransport` replaces only the socket.

Example::

    from lmbridge.testing import ScriptedServer, answer, reply

    async with ScriptedServer() as server:
        server.script(reply(503, {"error": "busy"}), answer("Hello"))
        ...  # point a client at server.api_base
        assert [request.path for request in server.requests] == ["/v1/chat/completions"] * 2

A behaviour is any async function of an `Exchange`, so you can write your own::

    async def break_off(exchange: Exchange) -> None:
        await exchange.delta("Hel")
        exchange.reset()

`OneModelServer` holds a single model, and kills what it is generating when another model is asked for.

`MockTransport` needs no socket: it calls a function for each request::

    client = LLMClient(transport=MockTransport(lambda request: {"choices": [{"message": {"content": "Hello"}}]}))

`lmbridge.testing.fixtures` contains a pytest fixture with a `ScriptedServer`.
"""

from lmbridge.testing.behaviours import answer, hang_up, raw, reply, reset, sse, stall
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.mock_transport import MockRequest, MockResponse, MockTransport
from lmbridge.testing.one_model_server import OneModelServer
from lmbridge.testing.scripted_server import ScriptedServer
from lmbridge.testing.wire import RecordedRequest

__all__ = [
    "Behaviour",
    "Exchange",
    "MockRequest",
    "MockResponse",
    "MockTransport",
    "OneModelServer",
    "RecordedRequest",
    "ScriptedServer",
    "answer",
    "hang_up",
    "raw",
    "reply",
    "reset",
    "sse",
    "stall",
]
