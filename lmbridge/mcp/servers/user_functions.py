"""Calls functions of the program that may be async or plain, and that may wait for a person, a file or a network."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def call_function(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function, async or plain, and returns its result.

    A plain function is called in a thread. If the caller is cancelled, the function runs on, and its result is dropped.
    """
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    result = function(*args) if is_async else await asyncio.to_thread(function, *args)
    return await result if inspect.isawaitable(result) else result
