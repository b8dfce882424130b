"""The public benchmark: seeded faults, an independent port to put them in, and a runner."""
