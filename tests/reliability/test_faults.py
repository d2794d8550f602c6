"""A sample of `make faults`: each kind of fault in each framing, at some of the bytes."""

from __future__ import annotations

import asyncio

import pytest

from lmbridge import LLMClient, LLMResponseError
from lmbridge.client.client_models import Models
from lmbridge.client.lmstudio import LMStudio
from lmbridge.testing import FaultKind
from tests.reliability.exchanges import MODEL, recorded_calls
from tests.reliability.faults import KINDS, Group, body_before, clean_value, run_group, texts_before
from tests.reliability.jumping_clock import JumpingLoop
from tests.reliability.public_coroutines import asynchronous_members
from tests.reliability.replay_server import ReplayServer
from tests.reliability.steps import FRAMINGS, Framing, Step
from tests.reliability.strict_reader import NotStrictError, StrictResponse, check_response, read_response


def outcomes_of(group: Group) -> dict[str, int]:
    tally = run_group(group)
    assert tally.findings == []
    assert tally.outcomes.total() == group.size
    return dict(tally.outcomes)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_gives_the_whole_value_or_a_named_error(kind: FaultKind, framing: Framing) -> None:
    # A packet for each byte takes long, and has no places to choose from.
    names = tuple(recorded_calls())[:: 5 if kind == "split" else 1]
    outcomes = outcomes_of(Group(names, framing, kind, step=797))
    assert set(outcomes) <= {"whole", "without usage", "error", "exempt"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_many_bytes_gives_the_whole_value_or_a_named_error(kind: FaultKind) -> None:
    for framing in FRAMINGS:
        outcomes_of(Group(tuple(recorded_calls()), framing, kind, step=53))


async def test_a_damaged_last_status_is_asked_for_once_more() -> None:
    """A client that does not know a status goes on asking, and gets the status without the fault."""
    step = recorded_calls()["LM Studio: download"].steps[2]
    damaged = StrictResponse(200, step.content_type, step.body.replace(b"completed", b"complfted"))
    value = await clean_value("LM Studio: download", 2, damaged)
    assert [each["status"] for each in value] == ["downloading", "downloading", "complfted", "completed"]


def faulted_steps() -> list[tuple[str, Step]]:
    return [
        (f"{name}: {call.steps[position].request}", call.steps[position])
        for name, call in recorded_calls().items()
        for position in call.faulted
    ]


# The refusal, and what a server without an endpoint answers, are no successes; the events of loads have no end.
COMPLETE = [(name, step) for name, step in faulted_steps() if step.status == 200 and "/sse" not in name]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("step", [step for _, step in COMPLETE], ids=[name for name, _ in COMPLETE])
def test_the_strict_reader_accepts_what_was_recorded_and_nothing_shorter(step: Step, framing: Framing) -> None:
    sent = step.framed(framing)
    response = read_response(sent, ended=framing == "close", is_stream=step.is_stream)
    assert response.body == step.body
    check_response(step, response)
    half = sent[: len(sent) // 2]
    with pytest.raises(NotStrictError):
        check_response(step, read_response(half, ended=True, is_stream=step.is_stream))


@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_text_that_has_arrived_grows_to_the_whole(framing: Framing) -> None:
    sent = recorded_calls()["chat, streamed"].steps[0].framed(framing)
    texts = [texts_before(sent[:at], framing)[0] for at in range(len(sent) + 1)]
    assert texts == sorted(texts, key=len)
    assert (texts[0], texts[-1]) == ("", "Hello! I'm here")


@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_body_that_has_arrived_grows_to_the_whole(framing: Framing) -> None:
    step = recorded_calls()["chat"].steps[0]
    sent = step.framed(framing)
    bodies = [body_before(sent[:at], framing) for at in range(len(sent) + 1)]
    assert bodies == sorted(bodies, key=len)
    assert (bodies[0], bodies[-1]) == ("", step.body.decode())


# The calls


@pytest.mark.parametrize("name", recorded_calls())
def test_a_call_makes_the_requests_that_are_replayed(name: str) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(_check_requests(name))


async def _check_requests(name: str) -> None:
    call = recorded_calls()[name]
    async with ReplayServer() as server:
        server.begin([(step.request, step.framed("length")) for step in call.steps])
        requests = server.requests
        async with LLMClient(f"{server.origin}/v1", MODEL, max_retries=0) as client:
            if name == "refusal":
                with pytest.raises(LLMResponseError):
                    await call.make(client)
            else:
                assert await call.make(client) == await clean_value(name)
    assert requests == [step.request for step in call.steps]


# Every request of the client is replayed

REPLAYED = {
    "LLMClient.chat_completion": ("chat", "chat, streamed", "tool call, streamed", "refusal"),
    "LLMClient.text_completion": ("text", "text, streamed"),
    "LLMClient.create_response": ("response", "response, streamed"),
    "LLMClient.embeddings": ("embeddings",),
    "LLMClient.list_models": ("models",),
    "LLMClient.health_check": ("health",),
    "LLMClient.server_info": ("server info", "LM Studio: server info", "Ollama: server info", "vLLM: server info"),
    "LLMClient.count_tokens": ("token count", "vLLM: token count"),
    "LLMClient.decide": ("decision", "decision, as OpenAI's", "decision of a chat model"),
    "LMStudio.models": ("LM Studio: models", "LM Studio before 0.4.0: models"),
    "LMStudio.load": ("LM Studio: load",),
    "LMStudio.unload": ("LM Studio: unload",),
    "LMStudio.download": ("LM Studio: download",),
    "Models.list": ("router: models",),
    "Models.load": ("router: load", "Ollama: load"),
    "Models.unload": ("router: unload", "Ollama: unload"),
    "Models.download": ("router: download",),
    "Models.loading": ("router: progress of a load",),
}
EXCUSED = {
    "LLMClient.stream_chat": "its request is that of chat_completion",
    "LLMClient.ask": "its request is that of chat_completion",
    "LLMClient.parse": "its request is that of chat_completion",
    "LLMClient.server_infos": "its requests are those of server_info",
    "LLMClient.close": "it makes no request",
    "Models.capabilities": "its requests are those of server_info",
    "discover": "its requests are those of server_info",
}


def test_the_requests_of_every_public_coroutine_are_replayed() -> None:
    coroutines = {
        f"{owner.__name__}.{name}"
        for owner in (LLMClient, LMStudio, Models)
        for name in asynchronous_members(owner)
        if not name.startswith("_")
    }
    assert coroutines | {"discover"} == REPLAYED.keys() | EXCUSED.keys()
    replayed = {name for names in REPLAYED.values() for name in names}
    assert replayed == recorded_calls().keys()
