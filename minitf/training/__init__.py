"""Training: the task, the step, the loop over steps, and the actions between them."""
