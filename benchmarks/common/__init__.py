"""What the benchmarks share; imports nothing of the other rooms."""
