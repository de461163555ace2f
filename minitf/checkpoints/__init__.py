"""Runs on disk: the directory of a run, its checkpoints as Hugging Face models, what goes out of them."""
