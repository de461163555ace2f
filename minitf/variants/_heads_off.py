"""Heads that are off for good: `model.heads_off=[[0,2]]`.

Their columns of the output projection count as zero, in training and afterwards, and are zero in every file. A model
without some heads is therefore still a Hugging Face model, which computes the same in every other program.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitf.attention import Linear
from minitf.errors import RequestError

if TYPE_CHECKING:
    from minitf.model import ModelConfig


class HeadsOff(Linear):
    """`o_proj` of a layer in which some heads are off. No faster backend knows it: they decline by its name."""

    kept_C: Tensor  # 1 for the columns of heads that are on, else 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.kept_C).to(x.dtype))


def switch_off(layers: nn.ModuleList, config: "ModelConfig") -> nn.ModuleList:
    """`layers` with the heads of `config.heads_off` off."""
    for layer, heads in by_layer(config).items():
        projection: Any = layers[layer].get_submodule("self_attn.o_proj")
        projection.__class__ = HeadsOff  # not a new module, whose initial weights would draw random numbers
        kept_C = torch.ones(projection.in_features)
        kept_C[_columns(heads, config)] = 0
        projection.register_buffer("kept_C", kept_C, persistent=False)
    return layers


def silenced(name: str, weight: Tensor, config: "ModelConfig") -> Tensor:
    """The weight of this name as the model computes with it: a copy with zeros where heads are off.

    Optimisers carry momentum from before a head was switched off, so its columns may move without any effect.
    """
    for layer, heads in by_layer(config).items():
        if name == f"model.layers.{layer}.self_attn.o_proj.weight":
            weight = weight.detach().clone()
            weight[:, _columns(heads, config)] = 0
    return weight


def by_layer(config: "ModelConfig") -> dict[int, list[int]]:
    """The heads that are off, by layer. RequestError for one that does not exist."""
    found: dict[int, list[int]] = {}
    for pair in config.heads_off:
        if len(pair) != 2 or not (0 <= pair[0] < config.num_layers and 0 <= pair[1] < config.num_heads):
            raise RequestError(
                f"model.heads_off: {pair} is no [layer, head], counted from 0, of a model of {config.num_layers} "
                f"layers of {config.num_heads} heads"
            )
        found.setdefault(pair[0], []).append(pair[1])
    return found


def _columns(heads: Sequence[int], config: "ModelConfig") -> list[int]:
    K = config.head_dim
    return [column for head in heads for column in range(head * K, (head + 1) * K)]
