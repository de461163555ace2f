"""Rotary positions (RoFormer, Su et al., 2021), and the scaling of a context stretched after training.

Queries and keys are turned by an angle that grows with their position, so their product depends on their distance.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitf.errors import RequestError

# Type -> the numbers it cannot do without, named as in a Hugging Face config.json.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def rotary_table(head_dim: int, num_positions: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Cosines and sines of the rotation of each pair of channels at each position, shape (2, num_positions, head_dim).

    Channel pair i turns by `position * theta^(-2i / head_dim)` radians (RoFormer, equation 15), which the `scaling` of
    a pretrained model may change.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies, factor = scaled_frequencies(frequencies, theta, scaling or {})
    angles_TK = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return torch.stack([angles_TK.cos(), angles_TK.sin()]) * factor


def rotate(x_BHTK: Tensor, rotary_2TK: Tensor) -> Tensor:
    """Turn queries or keys by their position, so that their product depends on the distance between them.

    Pairs are (i, i + head_dim / 2), the arrangement of Llama and Qwen checkpoints.
    """
    cos, sin = rotary_2TK[..., : x_BHTK.shape[-1] // 2].to(x_BHTK.dtype).unbind()  # both halves turn alike
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """RequestError that names a type that is not supported, or a number that is missing."""
    kind = scaling.get("rope_type", "default")
    if kind not in NEEDED:
        raise RequestError(f"rope_type {kind!r} is not supported; {', '.join(NEEDED)} are")
    for name in NEEDED[kind]:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise RequestError(f"rope_type {kind!r} needs a positive {name}, not {value!r}")


def scaled_frequencies(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """The frequencies (head_dim / 2 radians a position) as `scaling` stretches them, and a factor for their cosines and
    sines."""
    kind = scaling.get("rope_type", "default")
    if kind == "linear":  # positions are read `factor` times closer together (Chen et al., 2023)
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones are left alone, those between take a mixture."""
    turns: Tensor = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)  # share of the original frequency
    return frequencies * torch.lerp(1 / torch.tensor(float(scaling["factor"])), torch.tensor(1.0), kept)


def _yarn(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), sections 3.2 and 3.4: as above by channel, with the scores sharpened."""
    half, factor = len(frequencies), scaling["factor"]

    def channel(turns: float) -> float:
        """The channel pair that turns so often in the original context."""
        wave = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return half * math.log(wave) / math.log(theta)

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretched = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = _sharpening(factor, scaling.get("mscale") or 1)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention_factor /= _sharpening(factor, scaling["mscale_all_dim"])
        else:
            attention_factor = _sharpening(factor, 1)
    return frequencies * (1 - stretched + stretched / factor), float(attention_factor)


def _sharpening(factor: float, mscale: float) -> float:
    """Equation 22 of YaRN."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1
