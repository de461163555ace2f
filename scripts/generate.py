"""Continue a text: python scripts/generate.py "PROMPT" [--run RUN]."""

from minitf.errors import run_command
from minitf.generate import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
