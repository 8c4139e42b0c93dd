"""While the model runs: hooks, rows, positions, recomputation."""
