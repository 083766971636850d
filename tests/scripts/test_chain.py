"""The chains of benchmarks/robustness/chain.py, smaller still: every script opens what the one before it left."""
