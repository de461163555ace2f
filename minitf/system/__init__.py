"""The machine: hardware, memory, files."""
