"""Metrics of text, and ablation of heads."""
