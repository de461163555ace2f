"""`python -m minitf.export`: see checkpoints/gguf.py."""

from minitf.checkpoints.gguf import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
