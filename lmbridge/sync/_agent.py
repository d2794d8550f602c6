"""Blocking classes, written by scripts/generate_sync.py: change that, or the asynchronous classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lmbridge.agent.agent as _agent
from lmbridge.agent.events import RunEvent
from lmbridge.sync._wrap import Stream, Wrapper, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmbridge.agent.chat_client import ChatClient, ChatClientPool
    from lmbridge.agent.result import RunResult, StopReason
    from lmbridge.agent.run_tools import AnyTool, OpenTools
    from lmbridge.agent.settings import Approve, MaxTokens, Task
    from lmbridge.agent.switching import SwitchPolicy
    from lmbridge.sync._client import LLMClient, LLMClientPool


class RunStream(Stream[RunEvent]):
    """The events of a run, as `agent.stream` and `handle.events()` return them.

    It is iterated once, by one task at a time, and is also an async context manager. It ends after `RunFinished`;
    any other end of the run is raised, with `.partial`. Leaving the stream of `agent.stream` early, in any way, cancels
    the run and waits for its end. Leaving the stream of `handle.events()` only detaches from the run.
    """

    wraps = "lmbridge.agent.runs:RunStream"

    @property
    def handle(self) -> RunHandle:
        """The handle of the run."""
        result: RunHandle = self._call(lambda: self.wrapped.handle)
        return result


class RunHandle(Wrapper):
    """A run that is in progress, as `agent.start` returns it.

    The run goes on whether or not it is awaited, has a listener, or its handle is kept::

        handle = agent.start("Summarise the report.")
        ...
        result = handle.result()

    Attributes:
        id: The id of the run, a random string.
    """

    wraps = "lmbridge.agent.runs:RunHandle"

    @property
    def stop_reason(self) -> StopReason:
        """Why the run ended, or "running"."""
        result: StopReason = self._call(lambda: self.wrapped.stop_reason)
        return result

    @property
    def done(self) -> bool:
        """Whether the run has ended, in whichever way."""
        result: bool = self._call(lambda: self.wrapped.done)
        return result

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far, which is valid at any moment and can be continued by another run."""
        result: list[dict[str, Any]] = self._call(lambda: self.wrapped.messages)
        return result

    @property
    def partial(self) -> RunResult:
        """The run so far. While the run is in progress, the `stop_reason` of this result is "running"."""
        result: RunResult = self._call(lambda: self.wrapped.partial)
        return result

    def cancel(self) -> bool:
        """Cancels the run, without waiting for its end. `handle.result()` waits for it, and raises.

        Returns:
            False if the run had already ended.
        """
        result: bool = self._call(self.wrapped.cancel)
        return result

    def events(self) -> RunStream:
        """Returns the events of the run from now on. Leaving the stream detaches from the run, which goes on."""
        result: RunStream = self._call(self.wrapped.events)
        return result

    def result(self) -> RunResult:
        """Waits for the end of the run, and returns its result. Cancelling the caller also cancels the run.

        Raises:
            TaskCancelledError: The run was cancelled.
            MaxRoundsExceededError: The run used up its rounds.
            LLMError: The run failed; `.partial` is the run so far.
        """
        result: RunResult = self._await(self.wrapped.result)
        return result


class Agent(Wrapper):
    """Lets a model work on a task with tools, round after round, until it has an answer.

    One agent serves any number of concurrent runs in one event loop. It owns nothing that has to be closed: the client
    remains the caller's::

        with LLMClient(model="qwen3-4b") as client:
            agent = Agent(client, tools=[add])
            result = agent.run("What is 317 plus 225?")
            print(result.text)

    Args:
        client: An `LLMClient`, an `LLMClientPool`, or another object that satisfies `ChatClient` or `ChatClientPool`.
            A client is borrowed from a pool for one generation at a time.
        model: The model for runs that do not name one. Default: the client's model.
        tools: The tools that the model may call: async or plain functions, `Tool`s, or providers with
            `async list_tools()`, which are asked at the start of each run.
        system_prompt: The leading system message of every run. Default: none.
        max_rounds: How many times the model is asked in one run. Default: 25.
        max_tokens: The maximum number of tokens in one reply. The default, "auto", means 8192, or the part of the
            model's context that the prompt leaves, if the length of the context is known and that part is smaller.
        max_seconds: The time limit of a run in seconds, including the time that it waits. When the time is up, the
            generation and the tool calls in progress are cancelled. Default: no limit.
        max_total_tokens: The number of tokens that a run may use, prompts included. It is checked between rounds.
            Default: no limit.
        switch_policy: What a run with another model does to the runs in flight: "isolate", the default, runs beside
            them, "reject" raises, "cancel" cancels them, and "drain" waits for their end.
        tool_timeout: Seconds that one tool call may take, unless the `Tool` has a `timeout`. None means no
            limit. Default: 60.
        max_parallel_tools: How many calls of one reply run at the same time. Default: 4.
        max_tool_output: How many characters of a call's result the model gets. The middle of a longer result is left
            out. Default: 20,000.
        max_bad_calls: A run ends after this many calls in a row that could not be made. Default: 5.
        approve: A function, async or plain, that is called with the `ToolCall` before each call, one at a time. If it
            returns False, the call is not made, and the model gets a refusal. A plain one must return quickly. An
            exception in it ends the run. Default: every call is made.
        open_tools: A function that returns an async context manager with the `RunTools` of one run, for tools that
            need a connection or a process. It is called with a `RunInfo` when the run has been admitted, and the
            context manager is exited when the run ends, however it ends. Default: none.
        output_type: The type of the answer, such as a pydantic model or `list[Book]`: all that `client.parse` accepts.
            The model may call tools as long as it likes. If its answer is not the output, it is asked up to three times
            to give it as JSON, each time in a round without tools. Default: the answer is a text.

    Raises:
        LLMValidationError: An argument is invalid.
    """

    wraps = "lmbridge.agent.agent:Agent"

    def __init__(
        self,
        client: LLMClient | ChatClient | (LLMClientPool | ChatClientPool),
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
        open_tools: OpenTools | None = None,
        output_type: Any = None,
    ) -> None:
        self._set_wrapped(
            _agent.Agent(
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
                open_tools=open_tools,
                output_type=output_type,
            )
        )

    @property
    def model(self) -> str | None:
        """The model for runs that do not name one; None if the server or the pool chooses it."""
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
        open_tools: OpenTools | None = None,
        output_type: Any = None,
    ) -> RunResult:
        """Works on a task until the model has answered, or until a limit ends the run without an answer.

        If the caller is cancelled, the generation on the server and all tools are stopped before the cancellation is
        raised.

        Args:
            task: What to do, as a string or as a list of content parts (text and images).
            model: The model of this run, which does not change while it is in progress. Default: the agent's.
            tools: The tools of this run, in place of the agent's `tools`.
            messages: A conversation to continue, such as `result.messages` of another run. Default: a new one.
            max_rounds: The limit of this run, in place of the agent's.
            max_tokens: The limit of this run, in place of the agent's.
            open_tools: Opens tools for this run, in place of the agent's `open_tools`.
            output_type: The type of this run's `result.output`, in place of the agent's `output_type`.

        Returns:
            The result. It contains an answer if its `stop_reason` is "stop". With an
            `output_type`, it always contains one, and `output` is an instance of that type.

        Raises:
            LLMValidationError: An argument is invalid, and nothing was sent; or the model did not give a valid output:
                `.body` is its last answer, and `.context["path"]` the place of the mistake.
            RunIncompleteError: The run has an `output_type`, and ended without an answer.
            MaxRoundsExceededError: The run used up its rounds.
            ModelChangedDuringExecutionError: The `switch_policy` refused or cancelled the run, or the server swapped
                models.
            ContextLengthExceededError: The conversation does not fit into the context, and cannot be trimmed further.
            LLMError: A request failed. Every error of a run that has begun holds the run so far in `.partial`.
        """
        result: RunResult = self._await(
            lambda: self.wrapped.run(
                task,
                model=model,
                tools=tools,
                messages=messages,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                open_tools=open_tools,
                output_type=output_type,
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
        open_tools: OpenTools | None = None,
        output_type: Any = None,
    ) -> RunStream:
        """Starts a run, and returns its events. The last event is `RunFinished`.

        The arguments are those of `run`. The run begins at once. Leaving the stream early cancels it::

            with agent.stream("What is 1 plus 2?") as events:
                for event in events:
                    print(event)

        Raises:
            LLMValidationError: An argument is invalid; nothing was sent. The errors of the run itself, which `run`
                lists, are raised by the iteration.
        """
        result: RunStream = self._call(
            lambda: self.wrapped.stream(
                task,
                model=model,
                tools=tools,
                messages=messages,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                open_tools=open_tools,
                output_type=output_type,
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
        open_tools: OpenTools | None = None,
        output_type: Any = None,
    ) -> RunHandle:
        """Starts a run in the background. The arguments are those of `run`.

        Returns:
            A handle that cancels the run, gives access to its events and messages, and waits for its result.

        Raises:
            LLMValidationError: An argument is invalid; nothing was sent. The errors of the run itself, which `run`
                lists, are raised by `handle.result()`.
        """
        result: RunHandle = self._call(
            lambda: self.wrapped.start(
                task,
                model=model,
                tools=tools,
                messages=messages,
                max_rounds=max_rounds,
                max_tokens=max_tokens,
                open_tools=open_tools,
                output_type=output_type,
            )
        )
        return result

    def switch_model(self, model: str) -> None:
        """Changes the model for runs that do not name one, once the runs that block the change have ended.

        With "isolate", the runs that took the agent's model are cancelled. With "cancel", all runs with another model
        are cancelled, and with "drain" the switch waits for their end. If the call is cancelled while it waits, the
        model is unchanged.

        Args:
            model: The name of the new model.

        Raises:
            LLMValidationError: The name is invalid.
            ModelChangedDuringExecutionError: The policy is "reject" and runs are in flight, or the call comes from a
                tool of a run that would have to end first.
        """
        self._await(lambda: self.wrapped.switch_model(model))
