"""Speed and memory, each figure with its setting (benchmarks/README.md)."""
