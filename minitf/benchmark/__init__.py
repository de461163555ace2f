"""Measures the speed of minitf on this machine, side by side with other programs: `python scripts/benchmark.py`.

The library itself does not import this package.
"""
