"""Kinds of layers, and what each is made of."""
