"""Before the first step: staged tensors and starts from data or other weights."""
