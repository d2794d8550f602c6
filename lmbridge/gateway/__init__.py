"""The gateway: an HTTP server that schedules the requests of every program on the machine to the model servers.

Importing this package takes longer than importing `lmbridge`, because it needs the server side of aiohttp.
"""

from lmbridge.gateway.gateway import Gateway

__all__ = ["Gateway"]
