"""Show the attention of a trained model: python scripts/attention.py "TEXT" [--run RUN] [--out FILE.html] [--json]."""

from minitf.errors import run_command
from minitf.interpretability.page import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
