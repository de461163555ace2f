"""How much memory and how many cores this process may use."""

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minitf.system.memory import free_memory, growth_of
from minitf.system.threads import set_threads, usable_cores

QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
def test_growth_of_this_process_is_measured() -> None:
    free = free_memory()
    assert free is not None
    assert free > 1 << 20
    if growth_of(lambda: None) is None:
        pytest.skip("a kernel without clear_refs")

    def fill() -> None:  # new memory, not what other tests have freed
        np.frombuffer(mmap.mmap(-1, 200_000_000), np.uint8)[:] = 1

    child = os.fork()  # alone: threads of other tests may free memory meanwhile
    if child == 0:
        found, again = growth_of(fill) or 0, growth_of(lambda: None)
        os._exit(0 if 150e6 < found < 300e6 and again is not None and again < 50e6 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_free_memory_respects_the_container(tmp_path: Path) -> None:
    groups, membership, proc = tmp_path / "groups", tmp_path / "membership", tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    membership.write_text("0::/\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) is None
    assert growth_of(lambda: None, tmp_path / "not_linux") is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", encoding="utf-8")
    (proc / "self/status").write_text("VmHWM:\t2000 kB\nVmRSS:\t1000 kB\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 5000 * 1024
    (groups / "memory.max").write_text("max\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 5000 * 1024
    (groups / "memory.max").write_text(f"{3000 * 1024}\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 2000 * 1024
    (groups / "memory.max").write_text("5\n", encoding="utf-8")
    assert free_memory(groups, membership, proc) == 0
    assert growth_of(lambda: None, proc) == 1000 * 1024


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "350000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/../elsewhere\n", {}, 8),
        ("5:memory:/m\n4:cpu,cpuacct:/docker/x\n", {QUOTA: "400000", PERIOD: "100000"}, 4),
        ("4:cpu:/\n", {QUOTA: "-1", PERIOD: "100000"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_usable_cores_respect_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    own = tmp_path / "own"
    own.write_text(membership, encoding="utf-8")
    assert usable_cores(tmp_path / "groups", own) == cores
    assert usable_cores(tmp_path / "groups", tmp_path / "not_linux") == 8


def test_threads_count_as_set_by_the_config_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads()
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert not set_threads()
        assert set_threads(1)
    finally:
        torch.set_num_threads(before)
