"""What attention does: its weights, scores and pictures, head by head."""
