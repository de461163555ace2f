"""Look inside a trained model: `python scripts/attention.py "TEXT" [--run RUN] [--out FILE.html] [--json]`."""

from minitf.attention_page import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
