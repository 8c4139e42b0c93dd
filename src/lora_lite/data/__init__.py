"""Rows of text from files, and what a model sees of them (floor 3): TRL makes the tokens."""
