"""What attention does, head by head: weights, scores, alignment, pictures."""
