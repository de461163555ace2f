"""CPU threads: how many this process may use, and how many PyTorch does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.errors import RequestError
from minitf.system import cgroups


def usable_cores(root: Path = cgroups.ROOT, membership: Path = cgroups.MEMBERSHIP) -> int:
    """Cores this process may keep busy: its CPU affinity, or fewer if its container has a CPU quota.

    PyTorch considers neither: with a quota of 2 of 64 cores it would start 64 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    version_2, version_1 = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    for quota_us, period_us in cgroups.limits("cpu", version_2, version_1, root, membership):
        if quota_us > 0 and period_us > 0:
            cores = min(cores, max(1, quota_us // period_us))
    return cores


def set_threads(wanted: int = 0, group: ProcessGroup = SINGLE) -> bool:
    """Set PyTorch's threads in each process; returns whether the user chose the number.

    0: $OMP_NUM_THREADS, else one per usable core (PyTorch leaves out a core's second thread). RequestError for more
    than the machine has.
    """
    num_cores = os.cpu_count() or 1
    if wanted > num_cores:
        raise RequestError(f"trainer.threads={wanted} is more than this machine's {num_cores} cores; leave it out")
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    if wanted:
        torch.set_num_threads(wanted)
    elif group.size > 1 and from_environment in ("", "1"):  # torchrun sets it to 1
        torch.set_num_threads(max(1, usable_cores() // group.local_size))
        return False
    elif not from_environment:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return bool(wanted or from_environment)


@contextmanager
def single_thread() -> Iterator[None]:
    """PyTorch on one thread inside."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
