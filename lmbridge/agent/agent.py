"""`Agent`: the settings that its runs share, and the methods that start runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Unpack, overload

from lmbridge._checks import check_model_name
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge.agent.chat_client import ChatClient, ChatClientPool
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.decision_gate import Gate, GatedApproval, as_gate
from lmbridge.agent.definition_budget import MaxDefinitionTokens
from lmbridge.agent.history import History
from lmbridge.agent.result import RunResult
from lmbridge.agent.runs import RunHandle, RunStream, current_permit
from lmbridge.agent.sampling import SamplingOptions
from lmbridge.agent.settings import (
    Approve,
    CompactionMode,
    MaxTokens,
    OnLimit,
    ReadTextCalls,
    SendReasoning,
    Settings,
    Task,
    ToolSearch,
    check_task,
)
from lmbridge.agent.switching import RunAdmission, RunPermit, SwitchPolicy
from lmbridge.agent.tool_sources import AnyTool, OpenTools, ToolSources
from lmbridge.client.context_overflow import ContextOverflow
from lmbridge.client.questions import TrueFalse
from lmbridge.config import Priority
from lmbridge.errors import LLMValidationError
from lmbridge.observe.observer import Observer

if TYPE_CHECKING:
    from lmbridge.agent.journal import Journal, JournalEntry

_OutputT = TypeVar("_OutputT")

AnyJournal: TypeAlias = "JournalEntry | Journal | str | os.PathLike[str]"
"""What `journal=` accepts: the path of a journal, a `Journal`, or a `JournalEntry`, which names a run in a journal."""
FindTools: TypeAlias = Callable[[Mapping[str, Any]], OpenTools]
"""A function that returns the `open_tools` of a resumed run, given the `JournalEntry.extra` with which it began."""


class AgentRunOptions(SamplingOptions, total=False):
    """The keyword arguments of a run, as `Agent.run` describes them, without `output_type` and `journal`.

    Each method declares those two itself: `output_type` because it decides the type of the result, and `journal`
    because the blocking methods accept another class for it.
    """

    model: str | None
    tools: Sequence[AnyTool] | None
    messages: Sequence[Mapping[str, Any]] | None
    max_rounds: int | None
    max_tokens: MaxTokens | None
    open_tools: OpenTools | None


class Agent(NotCopyable):
    """Lets a model work on a task with tools, round after round, until it has an answer.

    One agent serves any number of concurrent runs in one event loop. It owns nothing that has to be closed; the caller
    closes the client::

        async with LLMClient(model="qwen3-4b") as client:
            agent = Agent(client, tools=[add])
            result = await agent.run("What is 317 plus 225?")
            print(result.text)

    Args:
        client: An `LLMClient`, an `LLMClientPool`, or another object that satisfies `ChatClient` or `ChatClientPool`.
            A client is borrowed from a pool for one generation at a time.
        model: The model for runs that do not name one. Default: the client's model.
        tools: The tools that the model may call: async or plain functions, `Tool`s, or providers with
            `async list_tools()`, which is called at the start of each run. Default: none.
        system_prompt: The leading system message of every run. Default: none.
        max_rounds: How many rounds a run may have. In each round, the model is asked, and the calls in its reply are
            made. Default: 25.
        max_tokens: The maximum number of tokens in one reply. The default, "auto", means 8192, or fewer if the length
            of the model's context is known and the prompt leaves less room in it.
        max_seconds: The time limit of a run in seconds. The time that the run waits to be admitted counts as well. When
            the time is up, the generation and the tool calls in progress are cancelled, and the run ends with the stop
            reason "budget". Default: no limit.
        max_total_tokens: The number of tokens that a run may use, prompts included. It is checked between rounds.
            Default: no limit.
        switch_policy: What happens when a run with another model is started while runs are in flight. "isolate", the
            default, runs it beside them; "reject" raises an error; "cancel" cancels the runs in flight; "drain" waits
            until they have ended.
        tool_timeout: The time limit of one tool call in seconds, unless the `Tool` has its own `timeout`. None means no
            limit. Default: 60.
        max_parallel_tools: How many calls of one reply run at the same time. Default: 4.
        max_tool_output: How many characters of a call's result the model gets. The middle of a longer result is left
            out. Default: 20,000.
        compaction: How room is made when the conversation no longer fits into the model's context. "summarize" first
            shortens old results of tools. If that is not enough, it asks the model for notes on the oldest calls, and
            the notes replace these calls. "shorten" also shortens old results first, but then leaves out the oldest
            calls without notes. "drop" leaves out the oldest calls at once. `RunResult.messages` keeps everything in
            any case. Default: "summarize".
        context_overflow: What happens if a prompt is longer than the model's context even after compaction, or if the
            server has silently cut a prompt, as Ollama does. "warn" adds a warning to `RunResult.warnings`, and "raise"
            raises `ContextLengthExceededError`. Default: "warn".
        max_bad_calls: A run ends after this many consecutive replies whose calls were all invalid. Default: 5.
        on_limit: What happens when `max_rounds`, `max_total_tokens` or `repetition_limit` is reached. With "answer",
            the model is asked for its best answer in one more round without tools; the `stop_reason` of the result
            names the limit. With "raise", `max_rounds` raises a `MaxRoundsExceededError`, and the other two limits
            return the run so far. Default: "raise".
        max_nudges: How many times in one round the model may be asked again because its reply is neither an answer nor
            a call, or may be a mistake, such as a repeated call in a text. A message says what is wrong with the reply,
            but only once in a round for each kind of mistake. A whole run has at most three times this number of such
            messages. A model that already has results of tools, and still writes calls that cannot be made, is finally
            asked for its answer without tools. 0 means never. Default: 2.
        repetition_limit: A run ends when this many replies had the same call with the same result. From the third such
            reply on, the model gets a warning with the result. None allows any number of repetitions without a warning,
            for tasks in which they are normal, such as building again after each edit. Default: 5.
        deduplicate_calls: Whether identical calls of one reply are made only once, so that all of them get the same
            result. Pass False if the model may want such a call to be made several times, such as the roll of a die.
            Default: True.
        read_text_calls: What happens to calls that the model wrote as text, and that the server did not recognize.
            "always" makes them wherever they are meant as calls, "whole" only if the reply consists of nothing else,
            and "never" makes none. If one of them names a tool that the run does not have, none of them is made.
            Default: "always".
        repair_calls: Whether a call with small mistakes is made, provided that it can be read in only one way and that
            its arguments are then valid. Small mistakes are, for example, single quotes or a missing bracket in the
            JSON, or the name `getWeather` for `get_weather`. A repaired call has `repaired` set, which `approve` can
            check. Arguments that were cut off are never completed. Default: True.
        constrain_retries: Whether the reply after an invalid call is constrained to the JSON schema of its tool, by a
            `response_format`, so that the model corrects the call and does nothing else. This is done once after each
            invalid call. A server that has refused a constrained request gets no further ones. Default: True.
        tool_search: What happens to tools whose definitions do not fit into `max_definition_tokens`. With "auto", the
            model gets a tool `find_tools` with which it can find them. A tool that it finds, or that it calls by its
            name, is offered for the rest of the run if there is room for its definition, and can be called in any case.
            With "never", all tools are offered; only those of MCP servers are left out if they do not fit. Default:
            "auto".
        max_definition_tokens: About how many tokens the definitions of tools may take in each request. "auto" means
            half of the model's context, or no limit if the length of the context is unknown; None means no limit.
            Default: "auto".
        embedding_model: A model of the same server that ranks tools for `find_tools` by their meaning. Do not name one
            if the server can hold only one model, because it would have to swap them for each search. Default: None,
            which means that tools are found by the words in their names and descriptions.
        send_reasoning: Whether the model's reasoning is sent back to it as part of its messages. Some servers demand
            this, and others refuse it. "auto" begins to send it when a server has refused a request because the
            reasoning was missing, and remembers that for the model. Default: "auto".
        approve: An async or plain function that is called with the `ToolCall` before each call, one at a time. If it
            returns True, the call is made. If it returns False or a text, the call is not made, and the model reads
            that it was refused, with the text as the reason. If it returns another `ToolCall`, that one is made
            instead. A plain function must return quickly, because it blocks the event loop. An exception of the
            function ends the run. Default: every call is made.
        gate: A question about each call that a model answers before `approve` is called: a `Gate`, a `TrueFalse`, or
            the text of the question. The call is made only if the probability of the answer "true" is at least the
            `threshold` of the gate (see `LLMClient.decide`). Default: none.
        open_tools: A function that returns an async context manager with the `RunTools` of one run, for tools that
            need a connection or a process. It is called with a `RunInfo` when the run has been admitted, and the
            context manager is exited when the run ends, however it ends. Default: none.
        output_type: The type of the answer, such as a pydantic model or `list[Book]`; every type that `client.parse`
            accepts is possible. The model may call tools first. If its answer is not valid JSON of this type, the model
            is asked for such JSON up to three times, each time in a round without tools. Default: the answer is a text.
        temperature: How freely the model chooses the next token; 0 means the most likely one. By default, the
            parameters from this one to `extra_body` are not sent, and the server's own defaults apply.
        top_p: Chooses among the most likely tokens whose probabilities add up to this number, from 0 to 1.
        seed: Makes sampling repeatable, if the server supports it.
        stop: One or several texts at which the model stops.
        tool_choice: Whether the model calls a tool: "none", "auto", "required", or a dict that names one. A choice that
            forces a call applies only to the first round, because the run would otherwise never end.
        parallel_tool_calls: Whether the model may call several tools in one reply.
        extra_body: Further fields of each request, such as `{"top_k": 20}`, which replace fields of the same name. A
            `tool_choice` in it follows the rules of the option `tool_choice`.
        priority: How urgent the requests of the agent's runs are: "interactive", "normal", "batch" or an integer, as in
            `LLMClient`. A run that a tool starts has the priority of the run that called the tool. Default: the
            client's priority.
        observers: Objects that are notified of what happens in each run, such as `lmbridge.observe.TimelineObserver`.
            Pass them to the client as well to see its requests. Default: none.

    Raises:
        LLMValidationError: An argument is invalid.
    """

    _instead_of_a_copy = "pass the agent itself on, and create another one in each process"

    def __init__(
        self,
        client: ChatClient | ChatClientPool,
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
        compaction: CompactionMode = "summarize",
        max_bad_calls: int = 5,
        context_overflow: ContextOverflow = "warn",
        on_limit: OnLimit = "raise",
        max_nudges: int = 2,
        repetition_limit: int | None = 5,
        deduplicate_calls: bool = True,
        read_text_calls: ReadTextCalls = "always",
        repair_calls: bool = True,
        constrain_retries: bool = True,
        tool_search: ToolSearch = "auto",
        max_definition_tokens: MaxDefinitionTokens = "auto",
        embedding_model: str | None = None,
        send_reasoning: SendReasoning = "auto",
        approve: Approve | None = None,
        gate: Gate | TrueFalse | str | None = None,
        open_tools: OpenTools | None = None,
        output_type: Any = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        extra_body: Mapping[str, Any] | None = None,
        priority: Priority | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._source = ClientSource(client)
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
            compaction=compaction,
            max_bad_calls=max_bad_calls,
            context_overflow=context_overflow,
            on_limit=on_limit,
            max_nudges=max_nudges,
            repetition_limit=repetition_limit,
            deduplicate_calls=deduplicate_calls,
            read_text_calls=read_text_calls,
            repair_calls=repair_calls,
            constrain_retries=constrain_retries,
            tool_search=tool_search,
            max_definition_tokens=max_definition_tokens,
            embedding_model=embedding_model,
            send_reasoning=send_reasoning,
            approve=approve if gate is None else GatedApproval(self._source, as_gate(gate), approve),
            output_type=output_type,
            priority=priority,
            observers=observers,
            sampling={
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
                "stop": stop,
                "tool_choice": tool_choice,
                "parallel_tool_calls": parallel_tool_calls,
                "extra_body": extra_body,
            },
        )
        if embedding_model is not None:
            self._source.check_embeds()
        self._tool_sources = ToolSources(tools, open_tools)
        self._admission = RunAdmission(switch_policy, self._source.model if model is None else model)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._source!r} model={self.model!r}>"

    @property
    def model(self) -> str | None:
        """The model for runs that do not name one; None if the server or the pool chooses it."""
        return self._admission.default

    @overload
    async def run(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: type[_OutputT],
        **options: Unpack[AgentRunOptions],
    ) -> RunResult[_OutputT]: ...
    @overload
    async def run(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: Any = ...,
        **options: Unpack[AgentRunOptions],
    ) -> RunResult[Any]: ...
    @explains_missing_await
    async def run(
        self,
        task: Task,
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_rounds: int | None = None,
        max_tokens: MaxTokens | None = None,
        open_tools: OpenTools | None = None,
        journal: AnyJournal | None = None,
        output_type: Any = None,
        **sampling: Unpack[SamplingOptions],
    ) -> RunResult[Any]:
        """Works on a task until the model has answered, or until a limit ends the run without an answer.

        If the caller is cancelled, the generation on the server and the async tools are stopped before the cancellation
        is raised. A plain function in a thread cannot be stopped; see `ToolContext.cancelled`.

        Args:
            task: What to do, as a string or as a list of content parts (text and images).
            model: The model of this run, which does not change while the run is in progress. Default: the agent's.
            tools: The tools of this run, in place of the agent's `tools`.
            messages: A conversation to continue, such as `result.messages` of another run. Default: a new one.
            max_rounds: The limit of this run, in place of the agent's.
            max_tokens: The limit of this run, in place of the agent's.
            open_tools: Opens tools for this run, in place of the agent's `open_tools`.
            journal: A journal that keeps each step of the run, so that `Agent.resume` can continue the run after the
                program was interrupted: the path of a file, a `Journal`, or a `JournalEntry` with an id for the run.
                Default: none.
            output_type: The type of this run's `result.output`, in place of the agent's `output_type`.
            **sampling: `temperature`, `top_p`, `seed`, `stop`, `tool_choice`, `parallel_tool_calls` and `extra_body` of
                this run, in place of the agent's.

        Returns:
            The result. It contains an answer if its `stop_reason` is "stop". If the run has an `output_type`, there is
            always an answer, and `output` is an instance of that type. Type checkers infer it as for `client.parse`.

        Raises:
            LLMValidationError: An argument is invalid, and nothing was sent. Or the model did not give a valid output;
                then `.body` is its last answer, and `.context["path"]` says where the mistake is.
            RunIncompleteError: The run has an `output_type`, and ended without an answer.
            MaxRoundsExceededError: The run used up its rounds.
            ModelChangedDuringExecutionError: The `switch_policy` refused or cancelled the run, or the server swapped
                models.
            ContextLengthExceededError: The conversation does not fit into the context, and cannot be made to fit.
            JournalError: A step could not be written to the journal, or the journal cannot be used.
            LLMError: A request failed. Every error of a run that has begun holds the run so far in `.partial`.
        """
        handle = self._create_run(
            task,
            model=model,
            tools=tools,
            messages=messages,
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            open_tools=open_tools,
            journal=journal,
            output_type=output_type,
            sampling=sampling,
            is_muted=True,
        )
        return await handle.result()

    @overload
    def stream(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: type[_OutputT],
        **options: Unpack[AgentRunOptions],
    ) -> RunStream[_OutputT]: ...
    @overload
    def stream(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: Any = ...,
        **options: Unpack[AgentRunOptions],
    ) -> RunStream[Any]: ...
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
        journal: AnyJournal | None = None,
        output_type: Any = None,
        **sampling: Unpack[SamplingOptions],
    ) -> RunStream[Any]:
        """Starts a run, and returns its events. The last event is `RunFinished`.

        The arguments are those of `run`. The run begins at once. Leaving the stream early cancels the run::

            async with agent.stream("What is 1 plus 2?") as events:
                async for event in events:
                    print(event)

        Raises:
            LLMValidationError: An argument is invalid; nothing was sent. The errors of the run itself, which `run`
                lists, are raised by the iteration.
        """
        handle = self.start(
            task,
            model=model,
            tools=tools,
            messages=messages,
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            open_tools=open_tools,
            journal=journal,
            output_type=output_type,
            **sampling,
        )
        return RunStream(handle, owns_run=True)

    @overload
    def start(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: type[_OutputT],
        **options: Unpack[AgentRunOptions],
    ) -> RunHandle[_OutputT]: ...
    @overload
    def start(
        self,
        task: Task,
        *,
        journal: AnyJournal | None = ...,
        output_type: Any = ...,
        **options: Unpack[AgentRunOptions],
    ) -> RunHandle[Any]: ...
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
        journal: AnyJournal | None = None,
        output_type: Any = None,
        **sampling: Unpack[SamplingOptions],
    ) -> RunHandle[Any]:
        """Starts a run in the background. The arguments are those of `run`.

        Returns:
            A handle that cancels the run, gives access to its events and messages, and waits for its result.

        Raises:
            LLMValidationError: An argument is invalid; nothing was sent. The errors of the run itself, which `run`
                lists, are raised by `await handle.result()`.
        """
        return self._create_run(
            task,
            model=model,
            tools=tools,
            messages=messages,
            max_rounds=max_rounds,
            max_tokens=max_tokens,
            open_tools=open_tools,
            journal=journal,
            output_type=output_type,
            sampling=sampling,
            is_muted=False,
        )

    def _create_run(
        self,
        task: Task,
        *,
        model: str | None,
        tools: Sequence[AnyTool] | None,
        messages: Sequence[Mapping[str, Any]] | None,
        max_rounds: int | None,
        max_tokens: MaxTokens | None,
        open_tools: OpenTools | None,
        journal: AnyJournal | None,
        output_type: Any,
        sampling: SamplingOptions,
        is_muted: bool,
    ) -> RunHandle[Any]:
        settings = self._settings.for_run(
            max_rounds=max_rounds, max_tokens=max_tokens, output_type=output_type, sampling=sampling
        )
        return self._create_run_with(
            settings,
            check_task(task),
            model=check_model_name(model),
            tools=tools,
            messages=messages,
            open_tools=open_tools,
            journal=journal,
            is_muted=is_muted,
        )

    def _create_run_with(
        self,
        settings: Settings,
        task: str | list[Any],
        *,
        model: str | None,
        tools: Sequence[AnyTool] | None,
        messages: Sequence[Mapping[str, Any]] | None,
        open_tools: OpenTools | None,
        journal: AnyJournal | None,
        is_muted: bool,
    ) -> RunHandle[Any]:
        sources = self._tool_sources
        if tools is not None or open_tools is not None:
            sources = ToolSources(
                sources.tools if tools is None else tools, sources.open_tools if open_tools is None else open_tools
            )
        history = History(task, system_prompt=settings.system_prompt, messages=messages)
        recorder = None
        if journal is not None:
            # Most programs keep no journal, and need not import sqlite3.
            from lmbridge.agent.journal.stored_options import new_recorder  # noqa: PLC0415

            recorder = new_recorder(journal, task=task, messages=messages, model=model, settings=settings)
        return RunHandle(
            model,
            source=self._source,
            admission=self._admission,
            settings=settings,
            tool_sources=sources,
            history=history,
            is_muted=is_muted,
            journal=recorder,
            task=task,
        )

    @classmethod
    async def resume(
        cls,
        path: Journal | str | os.PathLike[str],
        *,
        client: ChatClient | ChatClientPool,
        tools: Sequence[AnyTool] = (),
        run_id: str | None = None,
        open_tools: OpenTools | None = None,
        approve: Approve | None = None,
        gate: Gate | TrueFalse | str | None = None,
        output_type: Any = None,
        observers: Sequence[Observer] = (),
    ) -> RunResult[Any]:
        """Resumes a run whose program was interrupted, and returns its result.

        The run has the same options, model and id as before. Only the functions, objects and types that a journal
        cannot keep have to be passed again. The conversation, the usage and the limits of the run continue where they
        were. A call that had ended is not made again. A call that had started, and may or may not have ended, is made
        again only if its tool is `idempotent`; otherwise the model reads that it may have happened. If the run is
        already finished, its result is returned. So this method can be called again and again until it returns::

            result = await Agent.resume("runs.db", client=client, tools=[read_report])

        The arguments that `Agent` takes as well are described there.

        Args:
            path: The journal of the run, or the path of the journal.
            client: The client that the run uses from now on.
            tools: The tools of the run, which have to include those with which it began. Default: none.
            run_id: The id of the run. Default: the only run that has no result yet, or the only run of the journal.
            open_tools: Opens the tools of the run that need a connection or a process. Default: none.
            approve: Decides about calls. If the run began with `approve` or `gate`, one of the two is required. Calls
                that were decided about before the interruption keep their decisions.
            gate: A question about each call. Default: none.
            output_type: The type of the output. It is required if the run began with one.
            observers: Objects that are notified of what happens in the run from now on. Default: none.

        Returns:
            The result, as `run` returns it. The calls in its `log` that were made before the interruption have no
            `raw`. The result of a run that was already finished has no `log`.

        Raises:
            JournalError: The journal cannot be used, it has no such run, it has several runs and `run_id` is None, the
                run is in progress elsewhere, or its model, tools or options are not those with which it began.
            LLMError: The run failed, as for `run`.
        """
        agent = cls(
            client,
            tools=tools,
            open_tools=open_tools,
            approve=approve,
            gate=gate,
            output_type=output_type,
            observers=observers,
        )
        handle = await agent._start_again(path, run_id)
        return await handle.result()

    async def _start_again(
        self,
        journal: Journal | str | os.PathLike[str],
        run_id: str | None,
        open_tools: FindTools | None = None,
        *,
        is_muted: bool = True,
    ) -> RunHandle[Any]:
        """Resumes a run in the background, with the client, the tools and the functions of this agent.

        Args:
            journal: The journal, or its path.
            run_id: The id of the run; None has the same meaning as for `resume`.
            open_tools: Returns the `open_tools` of the run, given its `JournalEntry.extra`. Default: the agent's.
            is_muted: True if the events of the run will not be read, so that it need not create any.
        """
        from lmbridge.agent.journal.stored_options import find  # noqa: PLC0415 - imports sqlite3

        found = await find(journal, run_id)
        return self._create_run_with(
            found.settings(self._settings),
            found.start.task,
            model=found.model,
            tools=None,
            messages=found.start.messages,
            open_tools=None if open_tools is None else open_tools(found.start.extra),
            journal=found.entry,
            is_muted=is_muted,
        )

    async def switch_model(self, model: str) -> None:
        """Changes the model for runs that do not name one, once the runs that block the change have ended.

        With "isolate", the runs that did not name a model are cancelled. With "cancel", all runs with another model
        are cancelled. With "drain", this method waits until all runs with another model have ended. If it is cancelled
        while it waits, the model is unchanged, unless the last of these runs ended in the same step of the event loop.

        Args:
            model: The name of the new model.

        Raises:
            LLMValidationError: The name is invalid.
            ModelChangedDuringExecutionError: The policy is "reject" and runs are in flight, or the call comes from a
                tool of a run that would have to end first.
        """
        if check_model_name(model) is None:
            raise LLMValidationError("model must be the name of a model, not None", hint="name the agent's new model")
        await self._admission.enter(RunPermit(requested_model=model, is_switch=True, parent=current_permit.get()))
