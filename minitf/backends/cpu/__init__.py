"""C kernels for this processor, for training and for decoding."""
