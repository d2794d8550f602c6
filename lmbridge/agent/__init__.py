"""The agent layer: autonomous loops over a client that it knows by a Protocol. Empty until its release."""
