"""The console commands of an installed minitf: each module's `main`, ended as every command is."""

from minitf.errors import run_command

# The modules are imported by the command that needs them: each starts as quickly as by itself.


def train() -> int:
    """`minitf-train`"""
    from minitf.train import main

    return run_command(main)


def generate() -> int:
    """`minitf-generate`"""
    from minitf.cli.generate import main

    return run_command(main)


def evaluate() -> int:
    """`minitf-evaluate`"""
    from minitf.cli.evaluate import main

    return run_command(main)


def attention() -> int:
    """`minitf-attention`"""
    from minitf.interpretability.page import main

    return run_command(main)


def export() -> int:
    """`minitf-export`"""
    from minitf.checkpoints.gguf import main

    return run_command(main)
