"""How fast, how exact and how large: `pytest bench/ --benchmark-only`, and `bench/gpu`."""
