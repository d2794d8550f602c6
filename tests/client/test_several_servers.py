"""What a client of several servers offers beside the requests: lists, infos, statistics, and single servers."""

from __future__ import annotations

from typing import NoReturn

import pytest

from lmbridge import (
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMError,
    LLMValidationError,
    ModelInfo,
    ModelValidator,
    NodePool,
    ServerInfo,
    Transport,
    sync,
)
from lmbridge.client.several_servers import combined_info
from lmbridge.testing import MockRequest, MockTransport
from tests.support import MESSAGES
from tests.threaded_server import ThreadedServer
from tests.transport.fake_servers import FakeServer, client_of, pool_of

ONE, TWO = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"


def test_one_server_in_a_list_is_the_same_as_no_list() -> None:
    client = LLMClient([ONE])
    assert isinstance(client._server.transport, Transport)
    assert client.api_base == ONE
    assert client.servers == (ONE,)


def test_a_client_of_several_servers_names_them() -> None:
    client = LLMClient(["http://127.0.0.1:1", TWO], "m")
    assert client.servers == (ONE, TWO)
    assert repr(client) == f"<LLMClient {ONE}, {TWO} model='m'>"
    assert client.with_options(timeout=3).servers == (ONE, TWO)
    assert LLMClient(base_url=(ONE, TWO)).servers == (ONE, TWO)


def test_api_base_can_be_set_to_a_list_and_back() -> None:
    client = LLMClient(ONE, api_key="a-key")
    other = client.with_options()
    client.api_base = [ONE, TWO]
    assert client.servers == other.servers == (ONE, TWO)
    assert [node.api_key for node in client._server.transport.nodes] == ["a-key", "a-key"]
    client.api_base = TWO
    assert list(other.servers) == [TWO]
    with pytest.raises(LLMValidationError):
        client.api_base = []


async def test_models_are_merged() -> None:
    one, two, three = FakeServer("one", ["a", "b"]), FakeServer("two", ["b", "c"]), FakeServer("three")
    client = client_of(one, two, three)
    three.down = ConnectionRefusedError()
    assert await client.list_models(max_retries=0) == ["a", "b", "c"]
    one.down = two.down = three.down
    with pytest.raises(LLMConnectionError):
        await client.list_models(max_retries=0)


async def test_a_client_is_healthy_if_one_of_its_servers_is() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    assert await client.health_check()
    one.down = ConnectionRefusedError()
    assert await client.health_check()
    assert [await client.at_server(url).health_check() for url in client.servers] == [False, True]
    two.down = one.down
    assert not await client.health_check()


async def test_each_server_describes_itself() -> None:
    one, two = FakeServer("one", ["a"]), FakeServer("two", ["b"], loaded=[])
    client = client_of(one, two)
    infos = await client.server_infos()
    assert infos == {
        one.api_base: ServerInfo(kind="lmstudio", models=(ModelInfo(id="a", loaded=True),)),
        two.api_base: ServerInfo(kind="lmstudio", models=(ModelInfo(id="b", loaded=False),)),
    }
    assert (await client.server_info()).models == (ModelInfo(id="a", loaded=True), ModelInfo(id="b", loaded=False))
    two.down = ConnectionRefusedError()
    infos = await client.server_infos(max_retries=0)
    assert isinstance(infos[two.api_base], LLMError)
    assert (await client.server_info(max_retries=0)).models == (ModelInfo(id="a", loaded=True),)


@pytest.mark.parametrize("error", [AssertionError("boom"), ExceptionGroup("boom", [OSError()])])
async def test_an_exception_that_is_not_an_error_of_lmbridge_arrives_unchanged(error: Exception) -> None:
    def handler(_: MockRequest) -> NoReturn:
        raise error

    for count in (1, 2):
        transports = [MockTransport(handler, api_base=f"http://s{number}.test/v1") for number in range(count)]
        client = LLMClient(transport=NodePool(transports), model="m")
        for ask in (client.list_models, client.server_info, client.server_infos, client.health_check):
            with pytest.raises(type(error)) as caught:
                await ask()
            assert caught.value is error


def test_what_servers_have_in_common_is_safe_for_each_of_them() -> None:
    idle = ModelInfo(id="m", loaded=False, slots=4, tools=True, size_bytes=9)
    loaded = ModelInfo(id="m", loaded=True, vision=True, tools=False, size_bytes=8)
    combined = combined_info(
        [
            ServerInfo(kind="llama.cpp", version="b1", context_length=8192, slots=4, models=(idle,)),
            ServerInfo(kind="llama.cpp", version="b2", context_length=4096, models=(loaded,)),
        ]
    )
    assert combined == ServerInfo(
        kind="llama.cpp",
        context_length=4096,
        slots=4,
        models=(ModelInfo(id="m", loaded=True, slots=4, tools=False, size_bytes=8),),
    )


@pytest.mark.parametrize(
    ("flags", "any_of", "all_of"),
    [
        ((True, False), True, False),
        ((True, None), True, None),
        ((False, None), None, False),
        ((None, None), None, None),
        ((False, False), False, False),
    ],
)
def test_what_one_server_does_not_report_is_unknown_only_if_it_matters(
    flags: tuple[bool | None, bool | None], any_of: bool | None, all_of: bool | None
) -> None:
    for given in (flags, flags[::-1]):
        infos = [
            ServerInfo(kind="ollama", models=(ModelInfo(id="m", loaded=each, vision=each, tools=each),))
            for each in given
        ]
        (model,) = combined_info(infos).models
        assert (model.loaded, model.vision, model.tools) == (any_of, all_of, all_of)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_model_that_one_server_has_loaded_has_the_status_of_that_server(is_first: bool) -> None:
    models = [ModelInfo(id="m", loaded=True, status="sleeping"), ModelInfo(id="m", loaded=False, status="unloaded")]
    infos = [ServerInfo(kind="llama.cpp", models=(each,)) for each in (models if is_first else models[::-1])]
    assert combined_info(infos).models == (models[0],)


async def test_statistics_have_an_entry_for_each_server() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    two.down = ConnectionResetError()
    for _ in range(2):
        await client.chat_completion(MESSAGES)
    stats = client.stats()
    assert {url: each.is_available for url, each in stats.by_server.items()} == {
        one.api_base: True,
        two.api_base: stats.by_server[two.api_base].is_available,
    }
    assert stats.by_model["m"].retries == stats.retries
    assert stats.in_flight == stats.queued == 0


async def test_one_of_several_servers_can_be_addressed() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    for server in (one, two):
        single = client.at_server(server.api_base.removesuffix("/v1"))
        assert await single.ask("Hi") == server.name
        assert single.with_options(priority="batch").servers == (server.api_base,)
        assert [model["key"] for model in await single.lmstudio.models()] == ["m"]
    with pytest.raises(LLMValidationError, match=r"is not a server of this client; it has http://one"):
        client.at_server(ONE)
    with pytest.raises(LLMValidationError, match=r"client.at_server\(url\).lmstudio"):
        _ = client.lmstudio


async def test_pools_and_validators_work_with_several_servers() -> None:
    one, two = FakeServer("one", ["a"]), FakeServer("two", ["b"])
    async with LLMClientPool(2, transport=pool_of(one, two)) as pool:
        for model, server in (("a", one), ("b", two)):
            async with pool.client(model) as client:
                assert await client.ask("Hi") == server.name
    async with ModelValidator(client=client_of(one, two)) as validator:
        assert await validator.get_available_models() == ["a", "b"]
        assert await validator.validate_model("b") == "b"
    assert ModelValidator([ONE, TWO])._client.servers == (ONE, TWO)
    assert LLMClientPool(2, api_base=[ONE, TWO])._client.servers == (ONE, TWO)


def test_blocking_clients_work_with_several_servers() -> None:
    with ThreadedServer() as server, sync.LLMClient([ONE, server.api_base], "test-model") as client:
        assert client.ask("Hi")
        assert client.servers == (ONE, server.api_base)
        assert client.at_server(server.api_base).health_check()
        assert set(client.server_infos(max_retries=0)) == {ONE, server.api_base}
