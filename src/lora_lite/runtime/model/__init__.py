"""What the model remembers of its adapters."""
