"""Finding the server and the model of a command."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lmbridge import FoundServer, Limits, LLMAuthenticationError, ModelInfo, ServerInfo
from lmbridge.cli import connection
from lmbridge.cli.command_runner import CommandError, UsageError
from lmbridge.cli.connection import choose_model, connect_to_server, find_server
from lmbridge.cli.options import ServerOptions
from lmbridge.cli.server_checks import check_model_switch
from lmbridge.cli.terminal import Terminal
from lmbridge.testing import OneModelServer, ScriptedServer, reply
from tests.support import MESSAGES

NOWHERE = "http://127.0.0.1:1/v1"


def found(server: ScriptedServer, *models: str, error: LLMAuthenticationError | None = None) -> FoundServer:
    info = ServerInfo(kind="unknown", models=tuple(ModelInfo(id=each) for each in models))
    return FoundServer(api_base=server.api_base, info=info, error=error)


def on_this_machine(monkeypatch: pytest.MonkeyPatch, servers: Sequence[FoundServer]) -> None:
    async def discover(**_options: object) -> list[FoundServer]:
        return list(servers)

    monkeypatch.setattr(connection, "discover", discover)


async def used(server: ScriptedServer, options: ServerOptions) -> str | None:
    """Returns the model that a request over the connection names, after a check that the server got it."""
    async with connect_to_server(options, Terminal()) as connected:
        await connected.client.chat_completion(MESSAGES)
    request = server.requests[-1]
    assert request.path == "/v1/chat/completions"
    model: str | None = request.json.get("model")
    return model


async def test_the_address_of_the_option_comes_before_that_of_the_environment(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", NOWHERE)
    assert await used(scripted_server, ServerOptions(api_base=scripted_server.api_base)) == "test-model"


@pytest.mark.parametrize("name", ["LMBRIDGE_API_BASE", "LMSTUDIO_HOST"])
async def test_the_environment_comes_before_the_servers_that_are_found(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with ScriptedServer() as other:
        on_this_machine(monkeypatch, [found(other)])
        monkeypatch.setenv(name, scripted_server.api_base)
        assert await used(scripted_server, ServerOptions()) == "test-model"
        assert other.requests == []


async def test_the_first_server_that_is_found_is_used_and_others_are_named(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedServer() as other:
        on_this_machine(monkeypatch, [found(scripted_server, "a"), found(other, "b")])
        assert await used(scripted_server, ServerOptions()) == "test-model"
        assert capsys.readouterr().err == (
            f"using {scripted_server.api_base}; there is also {other.api_base} (choose with --api-base)\n"
        )


async def test_a_server_that_has_the_model_is_preferred(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer() as other:
        on_this_machine(monkeypatch, [found(other, "b"), found(scripted_server, "a")])
        assert await used(scripted_server, ServerOptions(model="a")) == "a"


async def test_no_server_is_an_error_that_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch, [])
    with pytest.raises(CommandError, match="no model server was found on this machine") as caught:
        await find_server(None, Terminal())
    assert caught.value.status == 3
    assert "--local" in str(caught.value.hint)


async def test_a_server_that_was_found_gets_no_key_unless_it_requires_one(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "the-key")
    on_this_machine(monkeypatch, [found(scripted_server)])
    await used(scripted_server, ServerOptions())
    assert all("Authorization" not in request.headers for request in scripted_server.requests)
    on_this_machine(monkeypatch, [found(scripted_server, error=LLMAuthenticationError())])
    await used(scripted_server, ServerOptions())
    assert scripted_server.requests[-1].headers["Authorization"] == "Bearer the-key"


@pytest.mark.parametrize("requires_key", [False, True])
async def test_separate_clients_send_the_key_to_a_server_that_was_found_only_if_it_requires_one(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, requires_key: bool
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "the-key")
    error = LLMAuthenticationError() if requires_key else None
    on_this_machine(monkeypatch, [found(scripted_server, "a", "b", error=error)])
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "a"}, {"id": "b"}]}))
    async with connect_to_server(ServerOptions(), Terminal()) as connected:
        assert (await check_model_switch(connected)).state == "ok"
        async with connected.open_separate_client(Limits()) as client:
            assert client.model == connected.model == "a"
            await client.chat_completion(MESSAGES)
    keys = {request.headers.get("Authorization") for request in scripted_server.requests}
    assert {request.json["model"] for request in scripted_server.requests if request.method == "POST"} == {"a", "b"}
    assert keys == ({"Bearer the-key"} if requires_key else {None})


async def test_the_embedded_server_and_an_address_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="--local and --api-base contradict each other"):
        async with connect_to_server(ServerOptions(local=True, api_base=NOWHERE), Terminal()):
            pass


async def test_a_server_without_a_list_of_models_can_be_used(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(404, {"error": "not found"}))
    assert await used(scripted_server, ServerOptions(api_base=scripted_server.api_base)) is None


async def test_a_refused_key_is_an_error(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(401, {"error": "invalid key"}))
    with pytest.raises(LLMAuthenticationError):
        await used(scripted_server, ServerOptions(api_base=scripted_server.api_base))


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        ([], None),
        ([ModelInfo(id="a"), ModelInfo(id="b")], "a"),
        ([ModelInfo(id="a", loaded=False), ModelInfo(id="b", loaded=True)], "b"),
        ([ModelInfo(id="e", loaded=True, embeds=True), ModelInfo(id="a", loaded=False)], "a"),
        ([ModelInfo(id="nomic-embed-text:latest", loaded=True), ModelInfo(id="qwen3:4b", loaded=False)], "qwen3:4b"),
    ],
)
def test_a_loaded_model_that_can_chat_is_chosen(models: list[ModelInfo], chosen: str | None) -> None:
    assert choose_model(models) == chosen


async def test_the_description_names_the_model_the_server_and_the_context(scripted_server: ScriptedServer) -> None:
    entry = {"id": "qwen3-4b", "object": "model", "owned_by": "vllm", "max_model_len": 8192}
    scripted_server.on_path("/v1/models", reply(200, {"data": [entry]}))
    async with connect_to_server(ServerOptions(api_base=scripted_server.api_base), Terminal()) as connected:
        assert connected.describe() == f"qwen3-4b on vLLM at {scripted_server.api_base} · context 8192"


async def test_a_model_that_was_loaded_for_the_first_answer_is_known_to_be_loaded() -> None:
    async with (
        OneModelServer(["a", "b"]) as server,
        connect_to_server(ServerOptions(api_base=server.api_base, model="a"), Terminal()) as before,
    ):
        assert before.info.loaded_models == ()
        await before.client.chat_completion(MESSAGES)
        after = await before.after_answer()
        assert after.info.loaded_models == ("a",)
        requests = len(server.requests)
        assert await after.after_answer() is after
        assert len(server.requests) == requests
