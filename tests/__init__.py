"""Tests mirror the source; `support` holds what they share, `bench` what measures, `peers` the real clients."""
