"""Measure speed on this machine, side by side with other programs: python scripts/benchmark.py [NAME ...]."""

from minitf.benchmark.__main__ import main
from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
