"""Files of every kind, read with suspicion and written atomically."""
