"""The machine: hardware, memory, threads, files."""
