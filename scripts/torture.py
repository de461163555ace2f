"""Kill a short run again and again; see minitf/faults/kills.py."""

from minitf.errors import run_command
from minitf.faults.kills import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
