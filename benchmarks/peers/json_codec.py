"""The JSON codec of the hand-written clients: orjson where it is installed, else msgspec, which is as fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

dumps: Callable[[Any], bytes]
loads: Callable[[bytes], Any]

try:
    import orjson

    dumps, loads = orjson.dumps, orjson.loads
except ImportError:
    import msgspec

    dumps, loads = msgspec.json.encode, msgspec.json.decode
