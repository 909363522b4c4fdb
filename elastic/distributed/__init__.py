"""Devices, hosts and where each part of an array lies."""
