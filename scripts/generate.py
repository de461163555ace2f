"""Continue a text: python scripts/generate.py "PROMPT" [--run RUN]."""

from minitf.cli.generate import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
