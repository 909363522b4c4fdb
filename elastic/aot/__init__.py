"""Ahead-of-time compilation for hardware that this machine does not have."""
