"""What the words mean: the variant contract, the registry, configs and errors (floor 1)."""
