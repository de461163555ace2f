"""Metrics of whole answers, and ablation of heads."""
