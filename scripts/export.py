"""Export a model for other programs: python scripts/export.py [--run RUN] [--format gguf] [--type f32|f16|q8_0]."""

from minitf.checkpoints.gguf import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
