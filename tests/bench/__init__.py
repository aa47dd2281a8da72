"""Benchmarks: `python -m tests.bench`. Commands, never timed tests."""
