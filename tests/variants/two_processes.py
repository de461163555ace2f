"""Trains every variant with each strategy, in processes that torchrun starts once; the arguments are settings."""

import sys
from pathlib import Path

from minitf.config.compose import compose_config
from minitf.distributed.process_group import process_group
from minitf.runs.start import train
from minitf.variants import names

if __name__ == "__main__":
    with process_group() as group:
        for strategy in ("ddp", "fsdp"):
            for variant in names():
                run_dir = f"run_dir={strategy}/{variant}"
                own = [f"model.variant={variant}", f"trainer.strategy={strategy}", run_dir]
                train(compose_config([*sys.argv[1:], *own]), Path(strategy, variant), group)
