"""The embedded server (extra `local`): llama.cpp with a small model, in a child process.

llama.cpp runs in a child process, although its Python binding could run it in a thread. In a thread, a crash would end
the whole program, loading a model would hold Python's GIL, and shutting down would wait for streams in flight. A child
process can simply be killed.

Importing this package is cheap, because only the child process imports llama.cpp.
"""

from lmbridge.local.local_server import LocalServer

__all__ = ["LocalServer"]
