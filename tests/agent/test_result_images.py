"""Images in results of tools: where they are sent, and what happens if a server or a model does not take them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lmbridge import Agent, LLMAuthenticationError, LLMClient, LLMResponseError, ToolCallFinished, ToolError, image_part
from lmbridge.agent.result_images import NOT_SHOWN, split_images
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, sse
from tests.agent.support import asks, calls, check_valid, generations, sent
from tests.agent.test_compaction import know_context

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
IMAGE: Any = image_part(PNG)
LINE = f"[image image/png, {len(PNG)} bytes]"
NO_EYES = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
BAD_MESSAGES = "Invalid 'messages' in payload. Please check the structure of your 'messages' and try again."


def look() -> Any:
    """Returns a picture."""
    return IMAGE


def describe() -> list[Any]:
    """Returns a picture between texts."""
    return ["Before.", IMAGE, {"type": "text", "text": "After."}]


def places_of_images(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns the role of each message that has images, and how many it has."""
    counts = [
        (each["role"], sum(part["type"] == "image_url" for part in each["content"]))
        for each in messages
        if isinstance(each["content"], list)
    ]
    return [(role, count) for role, count in counts if count]


def refuses(*roles: str, message: str = BAD_MESSAGES, status: int = 400) -> Behaviour:
    """Behaves as a server that refuses images in messages of some roles, and otherwise makes a call and an answer."""

    error = {"error": {"message": message, "code": status}}
    # A status of 200 stands for an error within a stream.
    refusal = sse(error) if status == 200 else reply(status, error)

    async def behave(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if any(role in roles for role, _ in places_of_images(messages)):
            await refusal(exchange)
        elif messages[-1]["role"] == "user" and isinstance(messages[-1]["content"], str):
            await calls(asks("look"))(exchange)
        else:
            await answer("I see.")(exchange)

    return behave


async def test_an_image_follows_the_results_of_its_turn(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("look"), asks("describe", "call_2")), answer("I see."))
    result = await Agent(client, tools=[look, describe]).run("Look.")
    messages = sent(scripted_server)["messages"]
    assert [each["role"] for each in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert [each["content"] for each in messages[2:4]] == [LINE, f"Before.\n{LINE}\nAfter."]
    assert messages[4]["content"] == [
        {"type": "text", "text": "[This image is part of the result of the tool look.]"},
        IMAGE,
        {"type": "text", "text": "[This image is part of the result of the tool describe.]"},
        IMAGE,
    ]
    check_valid(result.messages)
    scripted_server.script(answer("Again."))
    await Agent(client).run("And now?", messages=result.messages)
    assert places_of_images(sent(scripted_server)["messages"]) == [("user", 2)]


async def test_the_images_of_a_failure_are_shown_as_well(scripted_server: ScriptedServer, client: LLMClient) -> None:
    def press() -> str:
        """Presses a button."""
        raise ToolError("the button is missing", images=[IMAGE])

    scripted_server.script(calls(asks("press")), answer("I see."))
    result = await Agent(client, tools=[press]).run("Press it.")
    assert places_of_images(sent(scripted_server)["messages"]) == [("user", 1)]
    (record,) = result.log[0].tool_calls
    assert record.is_error
    assert record.images == (IMAGE,)
    assert record.text == "the button is missing"


async def test_events_and_the_log_have_the_images_and_the_raw_result(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("describe")), answer("I see."))
    events = [event async for event in Agent(client, tools=[describe]).stream("Look.")]
    (finished,) = [event for event in events if isinstance(event, ToolCallFinished)]
    assert finished.raw == describe()
    assert finished.record.images == (IMAGE,)


@pytest.mark.parametrize(
    ("behaviour", "requests", "places"),
    [
        (refuses(), 2, [("user", 1)]),
        (refuses("user"), 3, [("tool", 1)]),
        (refuses("tool"), 2, [("user", 1)]),
        (refuses("user", message="conversation roles must alternate user/assistant", status=500), 3, [("tool", 1)]),
        (refuses("user", "tool"), 4, []),
        (refuses("user", "tool", message=NO_EYES, status=500), 3, []),
        (refuses("user", "tool", message="Model does not support images. Please use a model that does."), 3, []),
        (refuses("user", "tool", message="test-model is not a multimodal model"), 3, []),
        (refuses("user", "tool", message="At most 0 image(s) may be provided in one prompt."), 3, []),
        (refuses("user", "tool", message="content must be a string", status=422), 4, []),
        (refuses("user", status=200), 3, [("tool", 1)]),
        (refuses("user", "tool", message=NO_EYES, status=200), 3, []),
    ],
)
async def test_images_are_sent_where_the_server_takes_them(
    scripted_server: ScriptedServer,
    client: LLMClient,
    behaviour: Behaviour,
    requests: int,
    places: list[tuple[str, int]],
) -> None:
    scripted_server.default = behaviour
    agent = Agent(client, tools=[look])
    result = await agent.run("Look.")
    assert result.text == "I see."
    assert len(generations(scripted_server)) == requests
    messages = sent(scripted_server)["messages"]
    assert places_of_images(messages) == places_of_images(result.messages) == places
    check_valid(messages)
    if not places:
        assert messages[-1]["content"] == f"{LINE}\n{NOT_SHOWN}"
    # The next run does not try the other places again.
    await agent.run("Look.")
    assert len(generations(scripted_server)) == requests + 2
    assert places_of_images(sent(scripted_server)["messages"]) == places


@pytest.mark.parametrize("roles", [("user",), ("user", "tool")])
async def test_results_that_were_shortened_stay_short_when_their_images_are_moved(
    scripted_server: ScriptedServer, client: LLMClient, roles: tuple[str, ...]
) -> None:
    def read() -> Any:
        """Reads a long page with a picture."""
        return ["page " * 3_900, IMAGE]

    know_context(scripted_server, 4_000)
    scripted_server.default = refuses(*roles)
    scripted_server.script(calls(asks("read")))
    result = await Agent(client, tools=[read]).run("Read.")
    texts = [_text_of(sent(scripted_server, number)["messages"][2]) for number in range(1, len(roles) + 2)]
    assert all("characters omitted" in text and len(text) < 12_000 for text in texts)
    (full,) = (_text_of(message) for message in result.messages if message["role"] == "tool")
    assert "page " * 3_900 in full


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


async def test_a_model_that_the_server_calls_blind_is_not_sent_images(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "test-model", "owned_by": "llamacpp"}]}))
    scripted_server.on_path("/props", reply(200, {"modalities": {"vision": False, "audio": False}}))
    scripted_server.script(calls(asks("look")), answer("I see."))
    result = await Agent(client, tools=[look]).run("Look.")
    assert result.messages[2]["content"] == f"{LINE}\n{NOT_SHOWN}"
    assert len(generations(scripted_server)) == 2


async def test_only_new_images_are_moved(scripted_server: ScriptedServer, client: LLMClient) -> None:
    async def one_image_only(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if len(places_of_images(messages)) > 1:
            await reply(400, {"error": {"message": "At most 1 image may be provided in one prompt."}})(exchange)
        else:
            turns = sum(each["role"] == "assistant" for each in messages)
            await (calls(asks("look", f"call_{turns}")) if turns < 2 else answer("I see."))(exchange)

    scripted_server.default = one_image_only
    agent = Agent(client, tools=[look])
    await agent.run("Look.")
    result = await agent.run("Look.")
    assert [each["role"] for each in result.messages[1:]] == [
        "assistant",
        "tool",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert places_of_images(result.messages) == [("user", 1)]
    assert result.messages[5]["content"].endswith(NOT_SHOWN)


@pytest.mark.parametrize(
    ("failure", "error", "requests"),
    [
        (reply(401, {"error": {"message": "no key for images"}}), LLMAuthenticationError, 2),
        (reply(400, {"error": {"message": "temperature must be a number"}}), LLMResponseError, 4),
    ],
)
async def test_another_error_after_images_ends_the_run(
    scripted_server: ScriptedServer, client: LLMClient, failure: Behaviour, error: type[Exception], requests: int
) -> None:
    scripted_server.script(calls(asks("look")), *[failure] * (requests - 1))
    agent = Agent(client, tools=[look])
    with pytest.raises(error):
        await agent.run("Look.")
    assert len(generations(scripted_server)) == requests
    # Nothing has been learned about images.
    scripted_server.script(calls(asks("look")), answer("I see."))
    await agent.run("Look.")
    assert places_of_images(sent(scripted_server)["messages"]) == [("user", 1)]


@pytest.mark.parametrize(
    ("failures", "place"),
    [
        (["CUDA error: an illegal memory access was encountered"] * 2, ("user", 1)),
        (["CUDA error: an illegal memory access was encountered"], ("user", 1)),
        (["CUDA error: an illegal memory access was encountered", BAD_MESSAGES], ("user", 1)),
        ([BAD_MESSAGES, "CUDA error: an illegal memory access was encountered"], ("tool", 1)),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_error_that_may_pass_does_not_make_an_agent_blind(
    scripted_server: ScriptedServer, client: LLMClient, failures: list[str], place: tuple[str, int], is_stream: bool
) -> None:
    refusals = [
        sse({"error": {"message": each}}) if is_stream else reply(500, {"error": {"message": each}})
        for each in failures
    ]
    scripted_server.script(calls(asks("look")), *refusals, answer("I see."))
    agent = Agent(client.with_options(max_retries=0), tools=[look])
    await agent.run("Look.")
    scripted_server.script(calls(asks("look")), answer("I see."))
    await agent.run("Look.")
    assert places_of_images(sent(scripted_server)["messages"]) == [place]


async def test_pictures_that_change_are_no_repetition(scripted_server: ScriptedServer, client: LLMClient) -> None:
    pictures = iter(range(10))

    def screenshot() -> Any:
        """Returns a picture of the screen."""
        return image_part(PNG + bytes([next(pictures)]))

    scripted_server.script(*[calls(asks("screenshot", f"call_{each}")) for each in range(7)], answer("I see."))
    result = await Agent(client, tools=[screenshot]).run("Watch.")
    assert result.stop_reason == "stop"
    assert "times" not in str(result.messages)


async def test_identical_calls_of_one_reply_show_their_image_once(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("look"), asks("look", "call_2")), answer("I see."))
    await Agent(client, tools=[look]).run("Look.")
    assert places_of_images(sent(scripted_server)["messages"]) == [("user", 1)]


class TextWithImages(str):
    __slots__ = ()
    image_parts = (IMAGE,)


@pytest.mark.parametrize(
    ("result", "text", "count"),
    [
        (IMAGE, LINE, 1),
        ((IMAGE, IMAGE), f"{LINE}\n{LINE}", 2),
        (["a", IMAGE], f"a\n{LINE}", 1),
        (TextWithImages("a"), "a", 1),
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, "[image]", 1),
    ],
)
def test_results_with_images_are_a_text_and_images(result: Any, text: str, count: int) -> None:
    without, images = split_images(result)
    assert (without, len(images)) == (text, count)


@pytest.mark.parametrize(
    "result",
    [
        "a",
        [],
        ["a"],
        {"type": "image_url"},
        {"type": "image_url", "image_url": "x"},
        [IMAGE, 5],
        {"image": IMAGE},
        None,
    ],
)
def test_other_results_stay_as_they_are(result: Any) -> None:
    assert split_images(result) == (result, ())
