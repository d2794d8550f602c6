"""lmbridge beside its peers and beside the limit: `make bench`, or `python -m benchmarks`."""
