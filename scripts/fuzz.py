"""Feed hostile input to everything that reads files; see tests/robustness/fuzz.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from robustness.fuzz import main

from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
