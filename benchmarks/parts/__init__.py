"""What the benchmark programs are made of."""
