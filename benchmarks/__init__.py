"""Benchmarks of lmbridge against hand-written code, other libraries and the official MCP SDK.

    python -m benchmarks [TABLE ...] [--rounds N] [--only ROW] [--write]

- `specification.py`: the classes that describe a table, with its rows, its peers, its bars and its page.
- `tables/`: one file for each table.
- `runner.py`: measures any table, in rounds; `processes.py` starts its processes.
- `workers/`: the programs of these processes, with a method for each workload.
- `peers/`, `agent_peers/`, `solving_peers/`, `schema_peers/`, `mcp_peers.py`, `gateways.py`: what is compared.
- `solving/`: tasks for agents, and the models that work on them.
- `stub.py`, `mcp_stub.py`, `swap_servers.py`, `routers.py`, `fleet_server.py`: the servers.
- `report.py`, `chart.py`, `swap_chart.py`: tables and charts of the results.

Some modules are programs of their own, for `python -m`: `benchmarks.admission` measures the admission of requests,
`benchmarks.journal_cost` the journal of runs, `benchmarks.observer_cost` the observers, and `benchmarks.service_times`
the embedded server. `benchmarks.scale` simulates many servers.
"""
