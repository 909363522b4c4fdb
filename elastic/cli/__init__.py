"""Flags, help and one-line errors."""
