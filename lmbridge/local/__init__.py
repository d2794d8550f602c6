"""The embedded server (extra `local`): llama.cpp with a small model, started as a child process.

Nothing heavy is imported here: llama.cpp itself is loaded in the child alone.
"""

from lmbridge.local.server import LocalServer

__all__ = ["LocalServer"]
