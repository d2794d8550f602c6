"""The gateway: an HTTP server that puts the schedule of lmbridge in front of every program on the machine.

Importing it takes longer than importing `lmbridge`, because it needs the server side of aiohttp.
"""

from lmbridge.gateway.gateway import Gateway

__all__ = ["Gateway"]
