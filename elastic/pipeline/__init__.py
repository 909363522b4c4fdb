"""What the commands do with a tokenizer."""
