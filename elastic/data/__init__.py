"""Training data: files to packed sequences of patches."""
