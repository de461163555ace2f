"""Faster implementations of the same model."""
