"""Configuration files that say which MCP servers there are."""
