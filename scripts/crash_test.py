"""Kill short runs and check that they resume bit for bit; see tests/robustness/crash.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from robustness.crash import main

from minitf.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
