"""What each command does: the function that its flags are given to."""
