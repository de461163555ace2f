"""What a run reports: console, metrics, TensorBoard, environment."""
