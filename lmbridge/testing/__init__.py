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

`FaultProxy` stands in front of any server and damages what it sends, at one byte of your choice.

`MockTransport` needs no socket: it calls a function for each request::

    client = LLMClient(transport=MockTransport(lambda request: {"choices": [{"message": {"content": "Hello"}}]}))

`FakeChatClient` is a client for agents that plays scripted turns, and `Cassette` records the exchanges with a real
server and replays them. `forbid_real_requests` makes sure that no test depends on a server by accident, and
`retry_without_waiting` makes tests of retries fast.

The plugin `_lmbridge_pytest_plugin`, which pytest loads by itself, has fixtures for all of this; docs/testing.md lists
them.
"""

from lmbridge.testing.behaviours import answer, hang_up, raw, reply, reset, sse, stall
from lmbridge.testing.cassette import Cassette, CassetteMode
from lmbridge.testing.cassette_file import CassetteError, CassetteRequest
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.fake_chat_client import FakeChatClient, FakeReply, FakeRequest
from lmbridge.testing.fault_proxy import FaultKind, FaultProxy, WireFault
from lmbridge.testing.mock_transport import MockRequest, MockResponse, MockTransport
from lmbridge.testing.one_model_server import OneModelServer
from lmbridge.testing.real_requests import RealRequestError, forbid_real_requests, retry_without_waiting
from lmbridge.testing.scripted_server import ScriptedServer
from lmbridge.testing.wire import RecordedRequest

__all__ = [
    "Behaviour",
    "Cassette",
    "CassetteError",
    "CassetteMode",
    "CassetteRequest",
    "Exchange",
    "FakeChatClient",
    "FakeReply",
    "FakeRequest",
    "FaultKind",
    "FaultProxy",
    "MockRequest",
    "MockResponse",
    "MockTransport",
    "OneModelServer",
    "RealRequestError",
    "RecordedRequest",
    "ScriptedServer",
    "WireFault",
    "answer",
    "forbid_real_requests",
    "hang_up",
    "raw",
    "reply",
    "reset",
    "retry_without_waiting",
    "sse",
    "stall",
]
