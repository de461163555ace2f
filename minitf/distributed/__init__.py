"""Training by several processes: the process group, sharded tensors."""
