"""What the rest stands on: processors and memory, the processes of a run, files that last, libraries in C."""
