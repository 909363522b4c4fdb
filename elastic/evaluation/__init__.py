"""Measuring a model on clips."""
