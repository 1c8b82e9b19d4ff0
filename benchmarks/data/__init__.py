"""Speed and memory of the data path: ``python -m benchmarks.data.run`` measures everything and writes the table."""
