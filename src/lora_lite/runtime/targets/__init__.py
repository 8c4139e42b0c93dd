"""Where: the structure of a model, and which of its layers a config chooses."""
