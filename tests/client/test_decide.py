"""`decide()`: decision models on both endpoints, and ordinary chat models in their place."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    Choice,
    LLMClient,
    LLMResponseError,
    LLMValidationError,
    ModelMismatchError,
    ModelNotFoundError,
    Score,
    TrueFalse,
)
from lmbridge.testing import ScriptedServer, reply, sse, stall
from tests.support import cancel_at_each_step, in_flight, piece

SYSTEM_ONE = "/v1/systemone"
DECISIONS = "/v1/decisions"
STATE = "I was charged twice for my order last week and nobody has replied."
QUESTIONS = {
    "route": Choice("Which team should handle this?", ["billing", "shipping", "technical"]),
    "angry": TrueFalse("Is the customer angry?"),
    "urgency": Score("How urgent is this?", ["can wait", "this week", "today", "right now"]),
}
WIRE: dict[str, Any] = {
    "route": {
        "type": "choice",
        "instructions": "Which team should handle this?",
        "criteria": {"billing": None, "shipping": None, "technical": None},
    },
    "angry": {"type": "noul", "instructions": "Is the customer angry?"},
    "urgency": {
        "type": "score",
        "instructions": "How urgent is this?",
        "criteria": ["can wait", "this week", "today", "right now"],
    },
}
ANSWERS = {
    "route": {
        "type": "choice",
        "choice": "billing",
        "probabilities": {"billing": 0.9998, "shipping": 0.0001, "technical": 0.0001},
        "confidence": 0.9997,
    },
    "angry": {"type": "noul", "noul": 0.6328},
    "urgency": {
        "type": "score",
        "score": 2.0858,
        "legend": {"0": "can wait", "1": "this week", "2": "today", "3": "right now"},
        "probabilities": {"0": 0.0023, "1": 0.116, "2": 0.6753, "3": 0.2064},
        "confidence": 0.673,
    },
}
"""The answers in the documentation of llama.cpp (tools/server/README.md)."""
BODY = {"model": "test-model", "answers": ANSWERS, "usage": {"input_tokens": 239, "output_tokens": 0}}
NOT_A_DECISION_MODEL = reply(
    501, {"error": {"code": 501, "message": "This model is not a decision model", "type": "not_supported_error"}}
)
"""What the embedded server answers for SmolLM2."""


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client


def labelled(*tokens: str, **logprobs: float) -> Any:
    """Does what `labelled_by` does, for the model of the client."""
    return labelled_by("test-model", *tokens, **logprobs)


def labelled_by(model: str, /, *tokens: str, **logprobs: float) -> Any:
    """Returns a streamed chat completion that consists of tokens. The one before the last has alternatives."""
    entries: list[dict[str, Any]] = [{"token": token, "logprob": -0.1, "top_logprobs": []} for token in tokens]
    top = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
    entries[-2] = {"token": tokens[-2], "logprob": logprobs.get(tokens[-2], -9.0), "top_logprobs": top}
    chunks = []
    for entry in entries:
        chunk = piece(entry["token"], model=model)
        chunk["choices"][0]["logprobs"] = {"content": [entry]}
        chunks.append(chunk)
    return sse(*chunks, piece(finish_reason="stop", model=model), done=True)


BEGINNING = ("{", '"label"', ":", ' "')


# Decision models


async def test_a_decision_model_answers_every_question_with_one_request(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(200, BODY))
    decisions = await client.decide(STATE, QUESTIONS)
    [request] = scripted_server.requests
    assert request.json == {"state": STATE, "questions": WIRE, "model": "test-model"}
    assert (decisions.calibrated, decisions.model, decisions.prompt_tokens) == (True, "test-model", 239)
    route, angry, urgency = (decisions.answers[name] for name in QUESTIONS)
    assert (route.winner, route.confidence, route.expected) == ("billing", 0.9997, None)
    assert route.probabilities["shipping"] == pytest.approx(0.0001)
    assert angry.winner is True
    assert angry.expected == 0.6328
    assert angry.probabilities[False] == pytest.approx(0.3672)
    assert urgency.winner == "today"
    assert urgency.expected == pytest.approx(2.0858)
    assert urgency.probabilities["right now"] == pytest.approx(0.2064)


async def test_questions_can_be_given_as_the_dicts_of_either_endpoint(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(200, BODY))
    of_openai: dict[str, Any] = {
        "route": {
            "type": "choice",
            "instructions": "Which team should handle this?",
            "choices": [{"value": each} for each in ("billing", "shipping", "technical")],
        },
        "angry": {"type": "predicate", "instructions": "Is the customer angry?"},
        "urgency": {
            "type": "score",
            "instructions": "How urgent is this?",
            "levels": [{"label": each} for each in ("can wait", "this week", "today", "right now")],
        },
    }
    for questions in (WIRE, of_openai):
        assert (await client.decide(STATE, questions)).answers["route"].winner == "billing"
        assert scripted_server.requests[-1].json["questions"] == WIRE


async def test_a_server_with_openais_form_alone_is_asked_in_that_form(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    answers = [
        {"type": "choice", "choice": "b", "confidence": 0.7, "name": "one", "probabilities": [
            {"value": "a", "probability": 0.2}, {"value": "b", "probability": 0.8}]},
        {"type": "predicate", "name": "two", "probability": 0.25},
        {"type": "score", "name": "three", "score": 0.9, "confidence": 0.5, "probabilities": [
            {"value": 0, "label": "low", "probability": 0.1}, {"value": 1, "label": "high", "probability": 0.9}]},
        {"type": "refusal", "name": "four"},
    ]  # fmt: skip
    scripted_server.on_path(SYSTEM_ONE, reply(404, {"error": {"message": "File Not Found", "type": "not_found_error"}}))
    scripted_server.on_path(DECISIONS, reply(200, {"model": "test-model", "answers": answers, "usage": {}}))
    questions = {
        "one": Choice("Which?", {"a": "the first", "b": None}),
        "two": TrueFalse("Really?", true="it is so"),
        "three": Score("How much?", ["low", "high"]),
        "four": TrueFalse("And this?"),
    }
    await client.decide({"text": "x"}, questions)
    decisions = await client.decide({"text": "x"}, questions)
    assert [request.path for request in scripted_server.requests] == [SYSTEM_ONE, DECISIONS, DECISIONS]
    sent = scripted_server.requests[-1].json
    assert json.loads(sent["input"]) == {"text": "x"}
    assert sent["questions"] == [
        {"type": "choice", "name": "one", "instructions": "Which?",
         "choices": [{"value": "a", "description": "the first"}, {"value": "b"}]},
        {"type": "predicate", "name": "two", "instructions": "Really?\nIt is true if: it is so"},
        {"type": "score", "name": "three", "instructions": "How much?",
         "levels": [{"label": "low"}, {"label": "high"}]},
        {"type": "predicate", "name": "four", "instructions": "And this?"},
    ]  # fmt: skip
    assert [each.winner for each in decisions.answers.values()] == ["b", False, "high", None]
    assert decisions.calibrated


async def test_an_answer_that_does_not_fit_its_question_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for answers in ({}, {**ANSWERS, "route": {"probabilities": {"billing": 1.0}}}, {**ANSWERS, "angry": {"noul": 7}}):
        scripted_server.on_path(SYSTEM_ONE, reply(200, {**BODY, "answers": answers}))
        with pytest.raises(LLMResponseError, match="not a decision"):
            await client.decide(STATE, QUESTIONS)


async def test_an_option_that_is_not_a_text_does_not_fit_its_question(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    answers = [{"type": "choice", "name": "one", "probabilities": [{"value": ["a"], "probability": 1.0}]}]
    scripted_server.on_path(SYSTEM_ONE, reply(404, {"error": {"message": "File Not Found", "type": "not_found_error"}}))
    scripted_server.on_path(DECISIONS, reply(200, {"model": "test-model", "answers": answers, "usage": {}}))
    with pytest.raises(LLMResponseError, match="has no probability of each option"):
        await client.decide(STATE, {"one": Choice("Which?", ["a", "b"])})


async def test_a_missing_model_is_an_error_and_not_a_reason_to_ask_otherwise(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(404, {"error": "model 'test-model' not found"}))
    with pytest.raises(ModelNotFoundError):
        await client.decide(STATE, QUESTIONS)


async def test_a_decision_is_repeated_after_a_temporary_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(reply(503, {"error": "busy"}, {"Retry-After": "0"}), reply(200, BODY))
    assert (await client.decide(STATE, QUESTIONS)).calibrated


async def test_a_cancelled_decision_leaves_nothing_behind(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(200, BODY))

    async def is_idle() -> None:
        assert in_flight(client) == 0

    await cancel_at_each_step(lambda: client.decide(STATE, QUESTIONS), is_idle, at_least=3)


async def test_an_endpoint_that_is_gone_is_replaced_by_the_other_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gone = reply(404, {"error": {"message": "File Not Found", "type": "not_found_error"}})
    answers = [{"type": "predicate", "name": "angry", "probability": 0.25}]
    questions = {"angry": QUESTIONS["angry"]}
    scripted_server.on_path(SYSTEM_ONE, reply(200, {**BODY, "answers": {"angry": ANSWERS["angry"]}}))
    await client.decide(STATE, questions)
    scripted_server.on_path(SYSTEM_ONE, gone)
    scripted_server.on_path(DECISIONS, reply(200, {"model": "test-model", "answers": answers}))
    for _ in range(2):
        assert (await client.decide(STATE, questions)).calibrated
    expected = [SYSTEM_ONE, SYSTEM_ONE, DECISIONS, DECISIONS]
    assert [request.path for request in scripted_server.requests] == expected


# Chat models


async def test_a_chat_model_is_asked_for_labels_and_says_so_once(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    questions = {"tone": Choice("Which tone?", ["friendly", "angry"])}
    logprobs = {"friendly": math.log(0.1), "angry": math.log(0.3), "other": math.log(0.05)}
    scripted_server.script(*[labelled(*BEGINNING, "angry", '"}', **logprobs)] * 2)
    with caplog.at_level(logging.WARNING, "lmbridge.client"):
        await client.decide(STATE, questions)
        decisions = await client.decide(STATE, questions)
    assert [request.path.rpartition("/")[2] for request in scripted_server.requests] == [
        "systemone", "completions", "completions",
    ]  # fmt: skip
    [warning] = [record.getMessage() for record in caplog.records if "calibrated" in record.getMessage()]
    assert "not a decision model" in warning
    assert not decisions.calibrated
    answer = decisions.answers["tone"]
    assert answer.winner == "angry"
    assert answer.probabilities == {"friendly": pytest.approx(0.25), "angry": pytest.approx(0.75)}
    assert answer.confidence == pytest.approx(0.5)
    body = scripted_server.requests[-1].json
    assert body["logprobs"]
    assert body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"] == ["friendly", "angry"]
    assert STATE in body["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("question", "tokens", "logprobs", "winner", "expected"),
    [
        (TrueFalse("So?"), (*BEGINNING, "yes", '"}'), {"yes": -0.5, "no": -1.5}, True, 0.731),
        (Score("How?", ["a", "b", "c"]), (*BEGINNING, "2", '"}'), {"0": -3.0, "1": -2.0, "2": -1.0}, "c", 1.575),
        (Choice("Which?", ["tea", "tee"]), (*BEGINNING, "B", '"}'), {"A": -2.0, "B": -1.0}, "tee", None),
        (Choice("Which?", ["tea", "jam"]), ("{", '"label":', ' "te', 'a"}'), {' "te': -1.0, ' "j': -2.0}, "tea", None),
        (Choice("Which?", ["tea", "juice"]), (*BEGINNING, 'tea"', "}"), {'tea"': -1.0, "ju": -2.0}, "tea", None),
    ],
    ids=["yes or no", "levels", "letters for similar names", "a quote before the label", "a quote after the label"],
)  # fmt: skip
async def test_labels_are_found_however_they_are_split_into_tokens(
    scripted_server: ScriptedServer,
    client: LLMClient,
    question: Any,
    tokens: Any,
    logprobs: dict[str, float],
    winner: Any,
    expected: float | None,
) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    scripted_server.script(labelled(*tokens, **logprobs))
    answer = (await client.decide(STATE, {"q": question})).answers["q"]
    assert answer.winner == winner
    assert answer.expected == (None if expected is None else pytest.approx(expected, abs=1e-3))
    assert sum(answer.probabilities.values()) == pytest.approx(1)


async def test_the_way_is_remembered_without_a_model_until_another_model_answers(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    questions = {"q": TrueFalse("So?")}
    async with LLMClient(scripted_server.api_base) as client:
        for model in ("one", "one", "two"):
            scripted_server.script(labelled_by(model, *BEGINNING, "yes", '"}', yes=-0.5, no=-1.5))
            assert (await client.decide(STATE, questions)).model == model
        assert [request.path for request in scripted_server.requests].count(SYSTEM_ONE) == 1
        assert caplog.text.count("calibrated") == 1
        scripted_server.on_path(SYSTEM_ONE, reply(200, {**BODY, "answers": {"q": ANSWERS["angry"]}}))
        for _ in range(2):
            assert (await client.decide(STATE, questions)).calibrated
    assert [request.path for request in scripted_server.requests].count(SYSTEM_ONE) == 3


async def test_an_option_that_the_server_does_not_list_has_the_smallest_probability_that_it_lists(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    listed = {"red": math.log(0.6), "other": math.log(0.2)}
    scripted_server.script(labelled(*BEGINNING, "red", '"}', **listed))
    answer = (await client.decide(STATE, {"q": Choice("Which?", ["red", "blue"])})).answers["q"]
    assert answer.probabilities == {"red": pytest.approx(0.75), "blue": pytest.approx(0.25)}


async def test_a_server_without_log_probabilities_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(200, {"error": "Unexpected endpoint or method. (POST /v1/systemone)"}))
    scripted_server.on_path(DECISIONS, reply(200, {"error": "Unexpected endpoint or method. (POST /v1/decisions)"}))
    with pytest.raises(LLMResponseError, match="no log probabilities") as caught:
        await client.decide(STATE, QUESTIONS)
    assert "LM Studio" in str(caught.value)


async def test_without_fallback_a_chat_model_is_an_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match="'test-model' is not a decision model") as caught:
            await client.decide(STATE, QUESTIONS, fallback=False)
        assert (caught.value.asked, caught.value.status) == ("test-model", 501)
    assert {request.path for request in scripted_server.requests} == {SYSTEM_ONE}
    scripted_server.on_path(SYSTEM_ONE, reply(404))
    scripted_server.on_path(DECISIONS, reply(404))
    with pytest.raises(LLMResponseError, match="no endpoint for decisions"):
        await client.decide(STATE, QUESTIONS, fallback=False)


async def test_a_cancelled_fallback_stops_the_generation(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    scripted_server.script(stall(after=[piece("{")]))

    task = asyncio.create_task(client.decide(STATE, QUESTIONS))
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


# Arguments


@pytest.mark.parametrize(
    ("questions", "text"),
    [
        ({}, "questions is empty"),
        ([], "questions must be a dict"),
        ({"q": "Is it?"}, r"questions\['q'\] must be a question"),
        ({"q": {"type": "essay"}}, "unknown type 'essay'"),
        ({"q": {"type": "choice", "instructions": "Which?", "criteria": {"a": None}}}, "fewer than two"),
        ({"q": {"type": "score", "instructions": "How?", "criteria": ["a"]}}, "levels must be 2 to 10"),
        ({"q": {"type": "noul", "instructions": " "}}, "question must be a string that is not blank"),
        ({" ": TrueFalse("So?")}, "the name of a question"),
        (
            {"q": {"type": "choice", "instructions": "?", "choices": ["a", "b"]}},
            r"choices\[0\] must be a dict, not str",
        ),
        (
            {"q": {"type": "choice", "instructions": "?", "choices": [{"name": "a"}]}},
            r"choices\[0\]\['value'\] must be",
        ),
        (
            {"q": {"type": "choice", "instructions": "?", "choices": [{"value": ["a"]}]}},
            r"choices\[0\]\['value'\] must",
        ),
        ({"q": {"type": "choice", "instructions": "?", "choices": 2 * [{"value": "a"}]}}, "different strings"),
        ({"q": {"type": "choice", "instructions": "?", "choices": "ab"}}, "choices must be a list of dicts, not str"),
        ({"q": {"type": "choice", "instructions": "?"}}, "options must be a list or a dict"),
        ({"q": {"type": "score", "instructions": "?", "levels": ["a", "b"]}}, r"levels\[0\] must be a dict, not str"),
        ({"q": {"type": "score", "instructions": "?", "levels": [{"label": 1}]}}, r"levels\[0\]\['label'\] must be"),
        ({"q": {"type": "score", "instructions": "?", "levels": {"label": "a"}}}, "levels must be a list of dicts"),
        (
            {"q": {"type": "noul", "instructions": "?", "criteria": {"true": 1}}},
            "true must be a string or None, not int",
        ),
        ({"q": {"type": [], "instructions": "?"}}, "unknown type"),
    ],
)
async def test_bad_questions_are_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, questions: Any, text: str
) -> None:
    with pytest.raises(LLMValidationError, match=text):
        await client.decide(STATE, questions)
    assert not scripted_server.requests


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice("Which?", ["a"]),
        lambda: Choice("Which?", ["a", "a"]),
        lambda: Choice("Which?", "ab"),
        lambda: Choice("", ["a", "b"]),
        lambda: Score("How?", [str(level) for level in range(11)]),
        lambda: Score("How?", "ab"),
        lambda: TrueFalse("So?", false=1),  # type: ignore[arg-type]  # the wrong value is the case
        lambda: TrueFalse(None),  # type: ignore[arg-type]  # the wrong value is the case
    ],
)
def test_bad_questions_cannot_be_created(make: Any) -> None:
    with pytest.raises(LLMValidationError):
        make()


async def test_a_state_that_json_does_not_have_and_unknown_options_are_refused(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    with pytest.raises(LLMValidationError):
        await client.decide({1, 2}, QUESTIONS)
    with pytest.raises(TypeError, match="temperature"):
        await client.decide(STATE, QUESTIONS, temperature=0)  # type: ignore[call-arg]  # the wrong argument is the case
    assert not scripted_server.requests


async def test_a_chat_model_takes_at_most_twenty_options(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(SYSTEM_ONE, NOT_A_DECISION_MODEL)
    with pytest.raises(LLMValidationError, match="21 options"):
        await client.decide(STATE, {"q": Choice("Which?", [str(number) for number in range(21)])})
