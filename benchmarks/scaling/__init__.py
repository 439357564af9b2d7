"""Training steps over the number of ranks, on any cluster, or on one machine that can play several hosts."""
