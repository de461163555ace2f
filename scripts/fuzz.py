"""Hostile input for everything that reads; see minitf/faults/fuzz.py."""

from minitf.errors import run_command
from minitf.faults.fuzz import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
