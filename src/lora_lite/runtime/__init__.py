"""Where adapters live: targets, the layer view, hooks, names, rows, merge, calibration (floor 2). Knows no method by
name."""
