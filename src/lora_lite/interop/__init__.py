"""Neighbours: training loops and generation of other libraries (floor 4). Each is imported by the function that needs
it."""
