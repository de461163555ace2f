"""The command `python -m minitf.train`: see cli/train.py."""

from minitf.cli.train import main as main

if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
