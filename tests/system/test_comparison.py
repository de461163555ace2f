"""Measured choices survive bursts of other work: simulated, by times that the tests inject."""

import itertools
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from minitf.distributed.process_group import SINGLE
from minitf.system import hardware
from minitf.system.comparison import MAX_ROUNDS, Comparison, compare
from minitf.system.hardware import Peak, choose_hardware


def timer(seconds: float, *burst: float) -> tuple[Callable[[], float], Iterator[int]]:
    """Something that takes `seconds`, after times of `burst`; and the number of times it was measured."""
    times, count = itertools.chain(burst, itertools.repeat(seconds)), itertools.count()

    def measure() -> float:
        next(count)
        return next(times)

    return measure, count


@pytest.mark.parametrize(("other_s", "wins"), [(0.07, True), (0.14, False)])
@pytest.mark.parametrize("bursts", [((0.5,), ()), ((), (0.5,)), ((0.5,), (0.5,)), ((0.2, 0.2), (0.3,))])
def test_verdict_is_that_of_a_quiet_machine(
    other_s: float, wins: bool, bursts: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    one, _ = timer(0.1, *bursts[0])
    other, _ = timer(other_s, *bursts[1])
    found = compare(one, other)
    assert found.other_wins == wins


@pytest.mark.parametrize(("other_s", "rounds"), [(0.009, 1), (0.05, 2), (0.2, 2), (0.09, MAX_ROUNDS), (1.1, 1)])
def test_closer_ones_are_measured_more_often(other_s: float, rounds: int) -> None:
    (one, ones), (other, others) = timer(0.1), timer(other_s)
    compare(one, other)
    assert (next(ones), next(others)) == (rounds, rounds)


def test_long_measurements_are_not_repeated() -> None:
    (one, ones), (other, others) = timer(3.0), timer(2.9)
    assert compare(one, other, one_s=3.0).other_wins
    assert (next(ones), next(others)) == (0, 1)


def test_limit_moves_the_verdict_and_the_margin() -> None:
    assert Comparison(1.0, 1.1, limit=1.2).other_wins
    assert not Comparison(1.0, 0.9, limit=1 / 1.3).other_wins
    assert Comparison(1.0, 1.1, limit=1.2).margin == pytest.approx(1.2 / 1.1)
    assert Comparison(1.0, 1.1, limit=1.2).is_thin
    assert not Comparison(1.0, 0.5).is_thin
    assert Comparison(1.0, float("inf")).margin == float("inf")


@pytest.mark.parametrize(("speeds", "chosen"), [((250e9, 60e9), "bf16"), ((60e9, 60e9), "fp32"), ((2e9, 60e9), "fp32")])
@pytest.mark.parametrize("busy", [(0,), (1,), (0, 1)])
def test_precision_is_chosen_as_on_a_quiet_machine_and_says_its_margin(
    monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, float], chosen: str, busy: tuple[int, ...]
) -> None:
    """`speeds` of a core in bf16 and fp32; a burst of other work meets the first measurements."""
    by_dtype = dict(zip((torch.bfloat16, torch.float32), speeds, strict=True))
    count = itertools.count()

    def measure(device: torch.device, dtype: torch.dtype, **size: int) -> float:
        return by_dtype[dtype] / (5 if next(count) in busy else 1)

    monkeypatch.setattr(hardware, "measure_matmul", measure)
    monkeypatch.setattr(hardware, "BURST_S", 0.0)
    found = choose_hardware("cpu", "auto", SINGLE)
    assert found.dtype == hardware.PRECISIONS[chosen]
    assert re.search(
        r"a core does \S+ GFLOP/s in bf16 and \S+ in fp32: \S+ times, and bf16 pays from 1.3$", found.reason
    )


def test_thin_margin_between_precisions_is_measured_again_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work slows bf16, and only bf16, down until somebody waits."""
    waited: list[float] = []

    def measure(device: torch.device, dtype: torch.dtype, **size: int) -> float:
        return 60e9 if dtype == torch.float32 else 200e9 if waited else 70e9

    monkeypatch.setattr(hardware, "measure_matmul", measure)
    monkeypatch.setattr(hardware.time, "sleep", waited.append)
    assert choose_hardware("cpu", "auto", SINGLE).dtype == torch.bfloat16
    assert waited == [hardware.BURST_S]


def test_share_of_the_peak_never_exceeds_one_and_the_peak_is_the_largest_seen() -> None:
    """The peak was measured while other programs were busy."""
    measured = iter([50e9, 200e9])
    peak = Peak(40e9, lambda: next(measured))
    assert peak.share(20e9) == 0.5
    assert peak.share(80e9) == 1.0  # still busy: nothing faster than the step itself was seen
    assert peak.share(40e9) == 0.5
    assert peak.share(100e9) == 0.5  # 200e9 was measured
    assert peak.share(200e9) == 1.0
