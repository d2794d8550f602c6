"""All tables. The files of this folder contain their rows, sizes and bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benchmarks.specification import Table
from benchmarks.tables.agents import AGENTS_TABLE
from benchmarks.tables.clients import CLIENTS_TABLE
from benchmarks.tables.fleet import FLEET_TABLE
from benchmarks.tables.gateway import GATEWAY_COST_TABLE, GATEWAY_SWAPS_TABLE
from benchmarks.tables.growth import GROWTH_TABLE
from benchmarks.tables.load import LOAD_TABLE
from benchmarks.tables.mcp_calls import MCP_CALLS_TABLE
from benchmarks.tables.model_swaps import MODEL_SWAPS_TABLE
from benchmarks.tables.nodes import NODES_TABLE
from benchmarks.tables.solving import LONG_TASKS_TABLE, SOLVING_TABLE
from benchmarks.tables.solving_real import SCHEMAS_TABLE, SOLVING_REAL_TABLE
from benchmarks.tables.steps import STEPS_TABLE

TABLES: Final[Mapping[str, Table]] = {
    table.name: table
    for table in (
        CLIENTS_TABLE,
        GROWTH_TABLE,
        STEPS_TABLE,
        AGENTS_TABLE,
        MCP_CALLS_TABLE,
        MODEL_SWAPS_TABLE,
        NODES_TABLE,
        FLEET_TABLE,
        GATEWAY_SWAPS_TABLE,
        GATEWAY_COST_TABLE,
        LOAD_TABLE,
        SOLVING_TABLE,
        LONG_TASKS_TABLE,
        SOLVING_REAL_TABLE,
        SCHEMAS_TABLE,
    )
}
