"""Benchmarks of the Kafka carrier, beside Kafka's own tools: `python -m tests.bench --parts kafka`."""
