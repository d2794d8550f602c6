"""The types of the fixtures in `conftest.py` that open raw connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from lmbridge.testing import ScriptedServer

Client: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial: TypeAlias = Callable[[ScriptedServer], Awaitable[Client]]
Post: TypeAlias = Callable[..., Awaitable[Client]]
