"""From text, files and the hub to batches of ids: read, split, tokenized once, packed."""
