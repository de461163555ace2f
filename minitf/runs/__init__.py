"""A run from its config to its end: start, resume, dry run, sweep."""
