"""Limits that Linux control groups (containers, batch systems) set for this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def limits(
    controller: str, version_2: list[str], version_1: list[str], root: Path = ROOT, membership: Path = MEMBERSHIP
) -> Iterator[list[int]]:
    """The numbers in these files of this process's control group and of each of its ancestors; none outside Linux."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        names = version_1 if controllers else version_2
        group = top / path.strip("/")
        for folder in [group, *group.parents]:
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                yield [int(number) for name in names for number in (folder / name).read_text("utf-8").split()]
            if folder == top:
                break
