"""Pure tensor mathematics: no modules, no configs (floor 1)."""
