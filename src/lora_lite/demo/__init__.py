"""A real base model and a real task in the box: `wordmath` and the bundled Llama (floor 4)."""
