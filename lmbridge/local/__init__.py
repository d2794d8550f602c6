"""The embedded server (extra `local`): llama.cpp with a small model, in a child process.

llama.cpp runs in a child process although its Python binding could run it in a thread. A crash in it would take the
program along, it holds Python's GIL while it loads a model, and its shutdown waits for streams that are in flight. A
child process can be killed.

Importing this package is cheap: llama.cpp is imported by the child process only.
"""

from lmbridge.local.local_server import LocalServer

__all__ = ["LocalServer"]
