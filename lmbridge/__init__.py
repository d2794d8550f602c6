"""lmbridge: an async SDK for the language models on your own machine."""
