"""Held-out metrics: python scripts/evaluate.py [--run RUN] [--json]."""

from minitf.errors import run_command
from minitf.evaluate import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
