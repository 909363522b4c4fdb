"""The device mesh, runs on many processes, and shardings of arrays."""
