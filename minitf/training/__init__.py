"""The training itself: a task, a step, the loop around it, and what it shows and keeps."""
