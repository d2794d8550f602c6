"""`lmbridge serve`, `gateway` and `mcp`: their options reach the servers of lmbridge."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import FoundServer, ServerInfo
from lmbridge.cli import serving
from lmbridge.gateway import Gateway
from tests.cli.support import Command

RUN = Command()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments with which the embedded server, the gateway and the bridge were started."""
    calls: list[Any] = []

    async def serve_local(options: dict[str, Any], api_key: str | None) -> None:
        calls.append((options, api_key))

    async def serve_gateway(gateway: Gateway) -> None:
        calls.append(gateway)

    monkeypatch.setattr("lmbridge.local.__main__.serve", serve_local)
    monkeypatch.setattr("lmbridge.gateway.__main__.serve", serve_gateway)
    monkeypatch.setattr("lmbridge.mcp.__main__.main", calls.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return calls


def test_the_options_of_the_embedded_server(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMBRIDGE_LOCAL_API_KEY", "a-key")
    assert RUN("serve").status == 0
    assert RUN("serve", "--port", "9931", "--context", "4096", "--parallel", "2", "--embeddings").status == 0
    assert served == [({}, "a-key"), ({"port": 9931, "n_ctx": 4096, "n_parallel": 2, "embeddings": True}, "a-key")]


def test_the_options_of_the_gateway(served: list[Any]) -> None:
    arguments = ["http://10.0.0.7:1234", "http://10.0.0.8:1234", "--port", "8081", "--max-loaded-models", "1"]
    assert RUN("gateway", *arguments) == (0, "", "")
    assert repr(served[0]) == "<Gateway not open for http://10.0.0.7:1234/v1, http://10.0.0.8:1234/v1>"


def test_the_gateway_takes_all_servers_that_are_found_but_itself(
    served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def discover(ports: list[int], _timeout: float) -> list[FoundServer]:
        return [
            FoundServer(api_base=f"http://127.0.0.1:{port}/v1", info=ServerInfo(kind="unknown")) for port in ports[:2]
        ]

    monkeypatch.setattr(serving, "discover", discover)
    assert RUN("gateway", "--port", "1234").status == 0
    assert repr(served[0]) == "<Gateway not open for http://127.0.0.1:9931/v1, http://127.0.0.1:8080/v1>"


def test_a_gateway_that_everybody_could_use_is_an_error_in_one_line(served: list[Any]) -> None:
    status, _, errors = RUN("gateway", "http://127.0.0.1:1234", "--host", "0.0.0.0")
    assert status == 2
    assert errors.startswith("error: listening on 0.0.0.0 would let everybody on the network use the gateway\nhint: ")
    assert served == []


def test_the_options_of_the_bridge(served: list[Any]) -> None:
    RUN("mcp", "--model", "qwen3-4b", "--eof-timeout", "3")
    RUN("mcp", "--debug")
    RUN("mcp", "--http", "--host", "::1", "--port", "0", "--allow-host", "my-pc", "--allow-host", "pc.local")
    allowed = ["--allow-host", "my-pc", "--allow-host", "pc.local"]
    assert served == [
        ["--model", "qwen3-4b", "--eof-timeout", "3.0"],
        ["--debug"],
        ["--host", "::1", "--port", "0", *allowed, "--http"],
    ]
