"""Benchmarks, run by `make bench`. Results with machine and date stand in docs/performance.md."""
