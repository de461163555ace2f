"""How a run reports: console, metrics.jsonl, TensorBoard, environment.json."""
