"""Ahead-of-time compilation for hardware one does not have."""
