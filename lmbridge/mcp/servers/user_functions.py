"""Calls the functions that a program passes to lmbridge, which may be async or plain, and may block for a long time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def call_function(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function, async or plain, and returns its result.

    A plain function is called in a thread, because it may wait for a person, a file or a network. If the caller is
    cancelled, the thread keeps running, and the result of the function is dropped.
    """
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    result = function(*args) if is_async else await asyncio.to_thread(function, *args)
    return await result if inspect.isawaitable(result) else result
