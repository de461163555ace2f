"""Print held-out metrics, or the importance of each head: python scripts/evaluate.py [--run RUN] [--json] [--heads]."""

from minitf.cli.evaluate import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
