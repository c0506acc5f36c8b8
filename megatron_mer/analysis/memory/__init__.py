"""How much memory a run takes on each rank, before it starts."""
