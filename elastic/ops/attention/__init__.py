"""Block-causal attention: one entrance, several implementations."""
