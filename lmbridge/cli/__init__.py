"""The command line (extra `cli`). Empty until its release."""
