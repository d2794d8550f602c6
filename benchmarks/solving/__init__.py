"""Tasks for agents, and a scripted model that makes the mistakes of small models while it works on them."""
