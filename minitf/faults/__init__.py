"""Faults made on purpose, to show that nothing is lost and nobody let in: kills, and hostile input."""
