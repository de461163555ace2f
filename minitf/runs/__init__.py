"""A run from its configuration to its end: start, resume, dry run, sweep."""
