"""Files: our own format, and other people's (floor 3)."""
