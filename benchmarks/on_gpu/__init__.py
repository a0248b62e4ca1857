"""The parts of benchmarks/gpu.py: each module has `run(record, tiny, left)`, which hands over rows."""
