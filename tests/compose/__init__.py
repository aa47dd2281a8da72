"""The deployment: its files against the code (fast), and the whole of it in containers (`make test-compose`)."""
