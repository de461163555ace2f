"""Print held-out metrics, or the importance of each head: python scripts/evaluate.py [--run RUN] [--json] [--heads]."""

from minitf.errors import run_command
from minitf.evaluate import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
