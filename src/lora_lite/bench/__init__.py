"""What adapters cost, measured with the public interface alone (floor 4)."""
