"""Several processes: the process group, sharded tensors."""
