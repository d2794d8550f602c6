"""The events that observers get: what happens to requests and to the runs of agents.

Each event names the request or the run that it belongs to, so an observer can follow any number of them at the same
time. `at` is always the time of the event in seconds, by `time.monotonic`.

The events of `agent.stream` are something else: they carry the texts of one run to a program that shows them, and they
wait for a slow reader. Observers do not get the text of a reply while it arrives, and must return at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import attrs

RequestOutcome: TypeAlias = Literal["answer", "error", "cancelled", "dropped", "moved"]
"""How a request ended.

"answer": the whole reply arrived. "error": the server reported an error, the connection broke, or a time limit ran out.
"cancelled": the program did not wait for its end; it cancelled the task, left the stream, or closed the client.
"dropped": its stream was garbage-collected. "moved": it was sent to another server instead, as a new request with
another id.
"""


@attrs.frozen(kw_only=True)
class RequestQueued:
    """A request has been made. It is the first event of every request, even of one that need not wait."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request, a number that is unique in this process."""
    operation: str
    """What the request is for, such as "chat completion" or "model list"."""
    url: str
    """The absolute URL, without query parameters."""
    model: str | None
    """The model that the request names, or None."""
    run_id: str | None
    """The id of the agent's run that makes the request; None outside of a run that has observers."""


@attrs.frozen(kw_only=True)
class RequestAdmitted:
    """A request has its permit. Questions about the server, such as model lists, need none and have no such event."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    waited: float
    """The seconds for which the request waited for its permit."""


@attrs.frozen(kw_only=True)
class ModelSwapped:
    """An admitted request makes the server load its model in place of another one."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    before: str | None
    """The model that is replaced."""
    after: str | None
    """The model of the request."""


@attrs.frozen(kw_only=True)
class AttemptBegun:
    """A request is sent."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    number: int
    """1 for the first attempt. If the request has moved to another server, the count goes on there."""


@attrs.frozen(kw_only=True)
class RetryPlanned:
    """An attempt has failed, and the request will be sent again."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    reason: str
    """Why the attempt failed, in a few words."""
    wait: float
    """The seconds until the next attempt."""
    is_poll: bool
    """Whether the server is loading, so that the attempt does not count as a retry."""


@attrs.frozen(kw_only=True)
class FirstEventArrived:
    """The first event of a stream has arrived, or the whole reply if it is not streamed.

    Events of the stream that only report the progress of the prompt do not count.
    """

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    is_stream: bool
    """True if the reply is a stream."""


@attrs.frozen(kw_only=True)
class RequestEnded:
    """A request has ended, and its permit has been returned. It is the last event of every request."""

    at: float
    """When it happened."""
    request_id: int
    """The id of the request."""
    outcome: RequestOutcome
    """How it ended."""
    status: int | None
    """The HTTP status of a reply that was read to its end, or None."""
    error: str | None
    """The name of the class of the exception that ended the request, or None."""
    attempts: int
    """How often the request was sent. If it has moved here from other servers, their attempts count as well."""
    prompt_tokens: int | None
    """The tokens of the prompt, or None if the server did not count them."""
    completion_tokens: int | None
    """The tokens that were generated, or None if the server did not count them."""
    cached_tokens: int | None = None
    """The tokens of the prompt that came from the server's cache, or None if the server does not say."""


@attrs.frozen(kw_only=True)
class RunBegun:
    """The run of an agent has begun. It may still have to wait until it is admitted."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    parent_run_id: str | None
    """The id of the run whose tool has started this one, or None."""
    model: str | None
    """The model that was asked for; None for the default of the agent or the client."""
    task: str
    """The task. Content parts other than text are left out."""


@attrs.frozen(kw_only=True)
class RoundBegun:
    """The model is about to be asked."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    number: int
    """The number of the round; the first one is 1."""
    model: str | None
    """The model of the run; None if the server chooses it."""


@attrs.frozen(kw_only=True)
class ModelLoadProgressed:
    """The run waits for the server to load its model, or more of the model has been loaded."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    model: str | None
    """The model, or None if it is not known."""
    fraction: float | None
    """How much of the model has been loaded, from 0 to 1; None in the first event, and if the server does not say."""


@attrs.frozen(kw_only=True)
class PromptProgressed:
    """The server has processed a part of the prompt of the current round. Only llama.cpp reports this."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    processed: int
    """How many tokens of the prompt have been processed, including those from the prompt cache."""
    total: int
    """How many tokens the prompt has."""
    cached: int
    """How many tokens come from the server's prompt cache."""


@attrs.frozen(kw_only=True)
class RoundEnded:
    """A round has ended, its tool calls included."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    number: int
    """The number of the round."""
    text: str
    """The model's answer; empty if the round was not completed."""
    is_complete: bool
    """Whether the round was completed. Otherwise the run ended in the middle of it."""


@attrs.frozen(kw_only=True)
class ToolCallBegun:
    """A tool is called. Calls that cannot be made, or are refused, have no events."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    call_id: str
    """The id of the call."""
    name: str
    """The name of the tool."""
    arguments: Mapping[str, Any]
    """The arguments with which it is called."""


@attrs.frozen(kw_only=True)
class McpRequestSent:
    """A tool call has sent a request to an MCP server. If the request is sent again, there is another event."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    call_id: str
    """The id of the call."""
    method: str
    """The method of the request, which is "tools/call"."""
    request_id: str
    """The id under which the request was sent."""
    server: str
    """The name of the server in the configuration."""
    transport: Literal["stdio", "http", "sse"]
    """How the server is reached."""
    host: str | None
    """The host of a server on HTTP; None for a server on stdio."""
    port: int | None
    """The port of a server on HTTP; None if its URL names none."""
    protocol: str
    """The revision of MCP that the session uses."""


@attrs.frozen(kw_only=True)
class ToolCallEnded:
    """A tool call has ended."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    call_id: str
    """The id of the call."""
    name: str
    """The name of the tool."""
    outcome: Literal["result", "error", "cancelled"]
    """Whether the tool returned, failed, or was cancelled together with its run."""
    text: str
    """What the model gets as the result; empty if the run was cancelled."""


@attrs.frozen(kw_only=True)
class RunEnded:
    """A run has ended. It is the last event of the run."""

    at: float
    """When it happened."""
    run_id: str
    """The id of the run."""
    stop_reason: str
    """Why it ended, as `RunResult.stop_reason` says."""
    error: str | None
    """The name of the class of the exception that the run ended with, or None."""
    model: str | None
    """The model that the run had, if it is known."""
    rounds: int
    """How many rounds had begun."""
    prompt_tokens: int
    """The tokens of all prompts, as far as the server counted them."""
    completion_tokens: int
    """The tokens that were generated, as far as the server counted them."""


ObservedEvent: TypeAlias = (
    RequestQueued
    | RequestAdmitted
    | ModelSwapped
    | AttemptBegun
    | RetryPlanned
    | FirstEventArrived
    | RequestEnded
    | RunBegun
    | RoundBegun
    | ModelLoadProgressed
    | PromptProgressed
    | RoundEnded
    | ToolCallBegun
    | McpRequestSent
    | ToolCallEnded
    | RunEnded
)
"""Any event that an observer gets."""
