"""Blocking classes, written by scripts/generate_sync.py: change that, or the asynchronous classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lmbridge.agent.agent as _agent
from lmbridge.agent.events import RunEvent
from lmbridge.sync._portal import portal
from lmbridge.sync._wrap import Stream, Wrapper, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmbridge.agent.agent import AnyTool
    from lmbridge.agent.result import RunResult, StopReason
    from lmbridge.agent.settings import Approve, MaxTokens, Task
    from lmbridge.agent.source import ChatClient, ChatPool
    from lmbridge.agent.switching import SwitchPolicy
    from lmbridge.sync._client import LLMClient, LLMClientPool


class RunStream(Stream[RunEvent]):
    """The events of a run: what `agent.stream` and `handle.events()` return.

    Iterate it, once and by one task at a time; it is an async context manager too. It ends after `RunFinished`;
    anything else raises, with `.partial`. Leaving that of `agent.stream` early, in any way, cancels the run and waits
    for its end. Leaving that of `handle.events()` only ends the listening.
    """

    wraps = "lmbridge.agent.runs:RunStream"

    @property
    def handle(self) -> RunHandle:
        """The run."""
        result: RunHandle = self._call(lambda: self.wrapped.handle)
        return result


class RunHandle(Wrapper):
    """A run that goes on by itself: what `agent.start` returns.

    It goes on whether anybody waits for it, listens to it, or keeps the handle.
    """

    wraps = "lmbridge.agent.runs:RunHandle"

    @property
    def stop_reason(self) -> StopReason:
        """Why it ended, or "running"."""
        result: StopReason = self._call(lambda: self.wrapped.stop_reason)
        return result

    @property
    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        result: bool = self._call(lambda: self.wrapped.done)
        return result

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far: valid at any moment, to be gone on with later."""
        result: list[dict[str, Any]] = self._call(lambda: self.wrapped.messages)
        return result

    @property
    def partial(self) -> RunResult:
        """The run so far, also while it goes on; `stop_reason` is "running" then."""
        result: RunResult = self._call(lambda: self.wrapped.partial)
        return result

    def cancel(self) -> bool:
        """Cancels the run, without waiting for its end; `handle.result()` waits, and raises.

        Returns:
            False if it had ended before.
        """
        result: bool = self._call(self.wrapped.cancel)
        return result

    def events(self) -> RunStream:
        """What the run tells from now on. Leaving it detaches, and the run goes on."""
        result: RunStream = self._call(self.wrapped.events)
        return result

    def result(self) -> RunResult:
        """Waits for the end of the run. Cancelled meanwhile, it cancels the run and waits for it.

        Raises:
            TaskCancelledError: the run was cancelled.
            MaxRoundsExceededError: it used up its rounds.
            LLMError: it failed; `.partial` is the run so far.
        """
        result: RunResult = self._await(self.wrapped.result)
        return result


class Agent(Wrapper):
    """Lets a model work on a task with tools, round after round, until it has an answer.

    One agent serves any number of runs at a time, in one event loop. It owns nothing that is to be closed: the client
    stays the caller's.

    Args:
        client: An `LLMClient`, or an `LLMClientPool`, which lends a client for each generation.
        model: Asked for where a run names none. Default: the client's.
        tools: What the model may call: async or plain functions, `Tool`s, or providers with `async list_tools()`,
            which are asked at the start of each run.
        system_prompt: The leading system message of each run.
        max_rounds: Times that the model is asked in a run.
        max_tokens: Tokens of a reply; "auto" for 8192, or what is left of the model's context if that is less.
        max_seconds: Seconds that a run may take, waiting included; whatever it does then is cut.
        max_total_tokens: Tokens that a run may use, prompts included; looked at between its rounds.
        switch_policy: What a run with another model does to those in flight: "isolate" runs beside them, "reject"
            refuses it, "cancel" cancels them, "drain" waits for their end.
        tool_timeout: Seconds that a call may take; None for any number.
        max_parallel_tools: Calls of one reply that are made at a time.
        max_tool_output: Characters of a call's result that the model is told; of more it gets the head and the tail.
        max_bad_calls: Calls in a row that cannot be made, after which a run ends.
        approve: Asked before each call, with the `ToolCall`, one call at a time; if it says no, the model is told so.
            Async, or plain and quick. What it raises ends the run.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    wraps = "lmbridge.agent.agent:Agent"

    def __init__(
        self,
        client: LLMClient | ChatClient | (LLMClientPool | ChatPool),
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] = (),
        system_prompt: str | None = None,
        max_rounds: int = 25,
        max_tokens: MaxTokens = "auto",
        max_seconds: float | None = None,
        max_total_tokens: int | None = None,
        switch_policy: SwitchPolicy = "isolate",
        tool_timeout: float | None = 60,
        max_parallel_tools: int = 4,
        max_tool_output: int = 20000,
        max_bad_calls: int = 5,
        approve: Approve | None = None,
    ) -> None:
        self.wrapped = portal.call(
            lambda: _agent.Agent(
                unwrap(client),
                model=model,
                tools=tools,
                system_prompt=system_prompt,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                max_seconds=max_seconds,
                max_total_tokens=max_total_tokens,
                switch_policy=switch_policy,
                tool_timeout=tool_timeout,
                max_parallel_tools=max_parallel_tools,
                max_tool_output=max_tool_output,
                max_bad_calls=max_bad_calls,
                approve=approve,
            )
        )

    @property
    def model(self) -> str | None:
        """The model of runs that name none; None where the server, or the pool, chooses."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    def run(
        self,
        task: Task,
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_rounds: int | None = None,
        max_tokens: MaxTokens | None = None,
    ) -> RunResult:
        """Works on a task until there is an answer, or a reason to end without.

        Cancelled, it stops the server's generation and all tools before it raises.

        Args:
            task: What to do: a text, or a list of content parts (text and images).
            model: The model of this run, which does not change while it goes on. Default: the agent's.
            tools: Those of this run, in place of the agent's.
            messages: The conversation to go on with, like `result.messages` of another run.
            max_rounds: In place of the agent's.
            max_tokens: In place of the agent's.

        Returns:
            The result; its `stop_reason` says whether it is an answer.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            MaxRoundsExceededError: the rounds were used up.
            ModelChangedDuringExecutionError: the `switch_policy` refused the run or had it cancelled, or the server
                swapped models.
            ContextLengthExceededError: the conversation does not fit into the context, and cannot be trimmed.
            LLMError: a request failed. Each of these has the run so far in `.partial`.
        """
        result: RunResult = self._await(
            lambda: self.wrapped.run(
                task, model=model, tools=tools, messages=messages, max_rounds=max_rounds, max_tokens=max_tokens
            )
        )
        return result

    def stream(
        self,
        task: Task,
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_rounds: int | None = None,
        max_tokens: MaxTokens | None = None,
    ) -> RunStream:
        """The same as `run`, as a stream of events, the last of which is `RunFinished`.

        The run begins at once. Leaving the stream early cancels it.

        Args:
            task: As for `run`.
            model: As for `run`.
            tools: As for `run`.
            messages: As for `run`.
            max_rounds: As for `run`.
            max_tokens: As for `run`.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
        """
        result: RunStream = self._call(
            lambda: self.wrapped.stream(
                task, model=model, tools=tools, messages=messages, max_rounds=max_rounds, max_tokens=max_tokens
            )
        )
        return result

    def start(
        self,
        task: Task,
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_rounds: int | None = None,
        max_tokens: MaxTokens | None = None,
    ) -> RunHandle:
        """The same as `run`, without waiting for it.

        Args:
            task: As for `run`.
            model: As for `run`.
            tools: As for `run`.
            messages: As for `run`.
            max_rounds: As for `run`.
            max_tokens: As for `run`.

        Returns:
            What cancels the run, tells its events and its messages, and waits for its result.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
        """
        result: RunHandle = self._call(
            lambda: self.wrapped.start(
                task, model=model, tools=tools, messages=messages, max_rounds=max_rounds, max_tokens=max_tokens
            )
        )
        return result

    def switch_model(self, model: str) -> None:
        """Gives the agent another model, when the runs in flight that `switch_policy` names have ended.

        "isolate" cancels those that took the agent's model, "cancel" all with another model; "drain" waits for the
        latter. Cancelled while it waits, it has changed nothing.

        Args:
            model: What later runs take that name none.

        Raises:
            LLMValidationError: the name cannot be right.
            ModelChangedDuringExecutionError: the policy is "reject", and runs are in flight; or a tool of a run asks
                for it that would have to end first.
        """
        self._await(lambda: self.wrapped.switch_model(model))
