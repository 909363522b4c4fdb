"""File formats and files: everything read is checked first, everything written is written atomically."""
