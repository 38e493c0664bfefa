"""Does it win? Problems, peers and one protocol, whose results stand in `results/` (README.md says how to run it)."""
