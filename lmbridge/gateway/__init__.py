"""The gateway: an HTTP server between the programs on a machine and their model servers, which schedules all requests.

Importing this package takes longer than importing `lmbridge`, because it needs the server side of aiohttp.
"""

from lmbridge.gateway.gateway import Gateway

__all__ = ["Gateway"]
