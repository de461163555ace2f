"""How fast minitf is on this machine, side by side with what it is compared to: `python scripts/benchmark.py`.

Nothing of the library imports this package.
"""
