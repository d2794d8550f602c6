"""MCP servers that lmbridge starts and connects to, and their tools as tools of an agent."""
