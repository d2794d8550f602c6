"""`discover` for programs without an event loop."""

from __future__ import annotations

from collections.abc import Iterable

from lmbridge.client import discovery
from lmbridge.client.discovery import DEFAULT_PORTS, FoundServer
from lmbridge.sync._portal import portal


def discover(ports: Iterable[int] = DEFAULT_PORTS, timeout: float = 0.5) -> list[FoundServer]:
    """Returns the model servers that run on this machine, as `lmbridge.discover` does, and blocks until it has them.

    Args:
        ports: The ports to try. Default: those of LM Studio, llama.cpp, Ollama and vLLM.
        timeout: How many seconds a server may take to describe itself. Default: half a second.

    Raises:
        LLMValidationError: An argument is not valid.
    """
    return portal.run(lambda: discovery.discover(ports, timeout))
