"""Where texts and pairs come from."""
