"""`Agent`: settings, and the runs that share them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, TypeAlias, TypeGuard

from lmbridge._checks import check_model_name
from lmbridge.agent.history import History
from lmbridge.agent.result import RunResult
from lmbridge.agent.runs import RunHandle, RunStream, current_ticket
from lmbridge.agent.settings import Approve, MaxTokens, Settings, Task, checked_task
from lmbridge.agent.source import ChatClient, ChatPool, Source
from lmbridge.agent.switching import Admission, SwitchPolicy, Ticket
from lmbridge.agent.tools import Tool, ToolProvider, as_tool
from lmbridge.agent.toolset import Equip, Equipment, Toolset
from lmbridge.errors import LLMValidationError

AnyTool: TypeAlias = Tool | Callable[..., Any] | ToolProvider


class Agent:
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

    def __init__(
        self,
        client: ChatClient | ChatPool,
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
        max_tool_output: int = 20_000,
        max_bad_calls: int = 5,
        approve: Approve | None = None,
    ) -> None:
        self._source = Source(client)
        self._settings = Settings(
            model=model,
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
        self._tools = _Tools(tools)
        self._admission = Admission(switch_policy, self._source.model if model is None else model)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._source!r} model={self.model!r}>"

    @property
    def model(self) -> str | None:
        """The model of runs that name none; None where the server, or the pool, chooses."""
        return self._admission.default

    async def run(
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
        handle = self._start(
            task,
            self._own(tools).equip,
            model=model,
            messages=messages,
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            is_muted=True,
        )
        return await handle.result()

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
        handle = self.start(
            task, model=model, tools=tools, messages=messages, max_rounds=max_rounds, max_tokens=max_tokens
        )
        return RunStream(handle, owns=True)

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
        return self._start(
            task,
            self._own(tools).equip,
            model=model,
            messages=messages,
            max_rounds=max_rounds,
            max_tokens=max_tokens,
        )

    def _own(self, tools: Sequence[AnyTool] | None) -> _Tools:
        return self._tools if tools is None else _Tools(tools)

    def _start(
        self,
        task: Task,
        equip: Equip,
        *,
        model: str | None,
        max_rounds: int | None,
        max_tokens: MaxTokens | None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        is_muted: bool = False,
    ) -> RunHandle:
        settings = self._settings.for_run(max_rounds=max_rounds, max_tokens=max_tokens)
        history = History(checked_task(task), system_prompt=settings.system_prompt, messages=messages)
        return RunHandle(
            check_model_name(model),
            source=self._source,
            admission=self._admission,
            settings=settings,
            equip=equip,
            history=history,
            is_muted=is_muted,
        )

    async def switch_model(self, model: str) -> None:
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
        if check_model_name(model) is None:
            raise LLMValidationError("model is None", hint="name the model that the agent is to use from now on")
        await self._admission.enter(Ticket(asked=model, is_switch=True, parent=current_ticket.get()))


class _Tools:
    """The tools that were given, put into a set once, or, where there are providers, for each run.

    Raises:
        LLMValidationError: something is no tool, or two have one name.
    """

    def __init__(self, tools: Sequence[AnyTool]) -> None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise LLMValidationError(f"tools is {tools!r}", hint="give a list of functions, Tools or providers")
        self._tools: list[Tool | ToolProvider] = []
        for each in tools:
            self._tools.append(each if _is_provider(each) else as_tool(each))  # type: ignore[arg-type]  # what is left
        own = [each for each in self._tools if isinstance(each, Tool)]
        self._set = Toolset(own)
        self._has_providers = len(own) < len(self._tools)

    def equip(self, _context: int | None) -> AbstractAsyncContextManager[Equipment]:
        """The tools for a run that begins."""
        return self._collected() if self._has_providers else nullcontext(Equipment(self._set))

    @asynccontextmanager
    async def _collected(self) -> AsyncIterator[Equipment]:
        yield Equipment(await Toolset.collect(self._tools))


def _is_provider(tool: AnyTool) -> TypeGuard[ToolProvider]:
    return not isinstance(tool, Tool | type) and isinstance(tool, ToolProvider)
