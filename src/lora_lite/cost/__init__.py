"""`ll.cost`: what training with an adapter costs, on paper (floor 3)."""
