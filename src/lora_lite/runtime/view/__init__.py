"""What a page sees of its layer."""
