"""Is a model what it should be: benchmarks' scorers, harnesses, proofs of a checkpoint."""
