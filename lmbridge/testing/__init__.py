"""Doubles to test with: a scripted server on a real socket, and what it can be told to do.

Example::

    from lmbridge.testing import ScriptedServer, answer, reply

    async with ScriptedServer() as server:
        server.script(reply(503, {"error": "busy"}), answer("Hello"))
        ...  # point a client at server.api_base
        assert [request.path for request in server.requests] == ["/v1/chat/completions"] * 2

What it is to do with a request is any async function of an `Exchange`::

    async def break_off(exchange: Exchange) -> None:
        await exchange.delta("Hel")
        exchange.reset()

`OneModelServer` is one that holds a single model, and kills what it is generating for the sake of the next.

`MockTransport` needs no socket: it calls a function for each request::

    client = LLMClient(transport=MockTransport(lambda request: {"choices": [{"message": {"content": "Hello"}}]}))

`lmbridge.testing.fixtures` has the scripted server as a pytest fixture.
"""

from lmbridge.testing.behaviours import answer, hang_up, raw, reply, reset, sse, stall
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.mock_transport import MockRequest, MockResponse, MockTransport
from lmbridge.testing.one_model import OneModelServer
from lmbridge.testing.server import ScriptedServer
from lmbridge.testing.wire import Request

__all__ = [
    "Behaviour",
    "Exchange",
    "MockRequest",
    "MockResponse",
    "MockTransport",
    "OneModelServer",
    "Request",
    "ScriptedServer",
    "answer",
    "hang_up",
    "raw",
    "reply",
    "reset",
    "sse",
    "stall",
]
