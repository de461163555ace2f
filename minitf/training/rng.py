"""The states of all random generators as tensors: a resumed run draws the same numbers as an uninterrupted one."""

import random

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed all of them."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % (1 << 32))


def capture() -> dict[str, Tensor]:
    """The states of PyTorch's generators (CPU and, once used, CUDA), Python's and NumPy's: 1-D, of constant length."""
    _, (*words, position), gauss = random.getstate()
    _kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "random_state": torch.get_rng_state(),
        "random_python": torch.tensor([*words, position]),
        "random_python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "random_numpy": torch.tensor([*map(int, keys), place, has_gauss]),
        "random_numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, one in enumerate(torch.cuda.get_rng_state_all()):
            state[f"random_cuda_{index}"] = one
    return state


def restore(tensors: dict[str, Tensor]) -> None:
    """Move the states that `capture` returned from `tensors` to the generators; those not in it stay as they are."""
    torch.set_rng_state(tensors.pop("random_state").to(torch.uint8).cpu())
    if (words := tensors.pop("random_python", None)) is not None:
        has_gauss, gauss = tensors.pop("random_python_gauss").tolist()
        random.setstate((3, tuple(words.tolist()), gauss if has_gauss else None))
    if (words := tensors.pop("random_numpy", None)) is not None:
        *keys, place, has_gauss = words.tolist()
        cached = float(tensors.pop("random_numpy_gauss"))
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    for name in sorted(name for name in tensors if name.startswith("random_cuda_")):
        one, index = tensors.pop(name), int(name.removeprefix("random_cuda_"))
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(one.to(torch.uint8).cpu(), index)
