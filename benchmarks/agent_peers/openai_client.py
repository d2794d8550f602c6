"""The client of openai-python for both frameworks."""

from __future__ import annotations

import openai
from openai import DEFAULT_CONNECTION_LIMITS

from benchmarks.agent_peers.base import AT_ONCE


def openai_client(base: str) -> openai.AsyncOpenAI:
    """Makes a client whose requests never wait for a connection."""
    limits = type(DEFAULT_CONNECTION_LIMITS)(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    # With the default of 5 s to connect, 1,000 requests at a time end with APITimeoutError.
    http_client = openai.DefaultAsyncHttpxClient(limits=limits, timeout=600.0)
    return openai.AsyncOpenAI(base_url=base, api_key="none", http_client=http_client, timeout=600.0)
