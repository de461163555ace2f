"""How weights move: Muon for the matrices, AdamW for the rest, and the learning rate as a function of the step."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minitf.errors import MinitfError, RequestError

SCHEDULES = ("wsd", "cosine", "constant")


@dataclass
class OptimConfig:
    kind: str = "muon"  # muon (matrices by Muon, the rest by AdamW) | adamw (everything by AdamW)
    learning_rate: float = 0.005  # peak, of AdamW
    matrix_learning_rate: float = 0.03  # peak, of Muon
    weight_decay: float = 0.1  # decoupled, of matrices; scaled by the learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's averaging of gradients and squares
    momentum: float = 0.95  # Muon's averaging of gradients
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    schedule: str = "wsd"  # wsd (warm-up, stable, linear decay) | cosine | constant
    warmup_fraction: float = 0.02  # share of the steps in which the rate rises from 0
    decay_fraction: float = 0.4  # share of the steps in which it falls to final_fraction (wsd)
    final_fraction: float = 0.0  # last rate as a share of the peak (wsd, cosine)

    def __post_init__(self) -> None:
        if self.kind not in ("muon", "adamw"):
            raise RequestError(f"optim.kind={self.kind} must be muon or adamw")
        if self.schedule not in SCHEDULES:
            raise RequestError(f"optim.schedule={self.schedule} must be one of {', '.join(SCHEDULES)}")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise RequestError(
                f"optim.warmup_fraction={self.warmup_fraction} and optim.decay_fraction={self.decay_fraction} "
                "are more than the whole run"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RequestError(f"optim.betas={list(self.betas)} must be two numbers, at least 0 and below 1")
        if not 0 <= self.momentum < 1:
            raise RequestError(f"optim.momentum={self.momentum} must be at least 0 and below 1")
        for name in ("learning_rate", "matrix_learning_rate", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(f"optim.{name}={getattr(self, name)} must be a number, at least 0")
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"optim.{name}={getattr(self, name)} must be between 0 and 1")


def schedule_bounds(config: OptimConfig, num_steps: int) -> tuple[float, float]:
    """The step up to which the rate rises, and the one from which on it falls (never: the one after the last)."""
    rises_to = config.warmup_fraction * num_steps
    falls_from = {
        "wsd": num_steps + 1 - max(config.decay_fraction * num_steps, 1),
        "cosine": rises_to,
        "constant": num_steps + 1,
    }
    return rises_to, falls_from[config.schedule]


def schedule_factor(config: OptimConfig, step: float, num_steps: int) -> float:
    """Learning rate of step `step` (1 to `num_steps`) as a share of the peak: a pure function, nothing to save."""
    num_warmup = config.warmup_fraction * num_steps
    if step < num_warmup:
        return step / num_warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - num_warmup) / (num_steps + 1 - num_warmup)  # as below: the last step still learns
        falling = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    else:
        # The step after the last would have rate 0: the last step still learns.
        falling = min(1.0, (num_steps + 1 - step) / max(config.decay_fraction * num_steps, 1))
    return config.final_fraction + (1 - config.final_fraction) * max(falling, 0.0)


# The quintic polynomials a x + b x^3 + c x^5 of Polar Express (Amsel et al., 2025), one an iteration: each is the one
# that brings singular values closest to 1 given where the ones before have left them. These four are computed for
# values from 0.003 to 1 and leave none of them further off than 0.21. A fifth costs a quarter more and gained nothing:
# 300 steps of the default run gave 1.368 bits per byte with five, 1.365 with these four and 1.372 with three.
POLAR_EXPRESS = (
    (8.3007, -24.0376, 17.4661),
    (4.0059, -2.9253, 0.5424),
    (3.4840, -2.5614, 0.5024),
    (2.5153, -1.8615, 0.4425),
)


def orthogonalise(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices: U V^T of each matrix U S V^T, all N in batched products of `dtype`."""
    transposed = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if transposed else matrices_NRC).to(dtype)  # products of the shorter side are the cheaper
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-6)
    if x.shape[2] >= 2 * x.shape[1] and dtype != torch.bfloat16:
        x = _orthogonalise_by_factors(x)
    else:
        for a, b, c in POLAR_EXPRESS:
            gram = torch.bmm(x, x.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if transposed else x


def _orthogonalise_by_factors(x_NRC: Tensor) -> Tensor:
    """The same, multiplying the factors of all iterations before x: products of the short side alone but for two.

    Where the other side is twice as long or more that is faster, up to twice. x does not come out of each iteration,
    so its x x^T has to be computed from the one before, for which bfloat16 is not exact enough.
    """
    gram, factor = torch.bmm(x_NRC, x_NRC.mT), None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else torch.bmm(polynomial, factor)
        if i + 1 < len(POLAR_EXPRESS):
            gram = torch.bmm(polynomial, torch.bmm(polynomial, gram))
    assert factor is not None
    return torch.bmm(factor, x_NRC)


class ParameterGroups:
    """Parameters with the settings of each group of them, and what is known of each parameter from earlier steps.

    As torch.optim.Optimizer has them, whose first instance imports most of PyTorch: 1 to 3 s of every start.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        """Each group has `params`; what else it does not say is as in `settings`."""
        self.param_groups = [{**settings, **group} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self) -> None:
        """Move the weights that have a gradient."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None


class AdamW(ParameterGroups):
    """Steps as large in every direction as their gradients are steady (Loshchilov & Hutter, 2019), by PyTorch."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] or self._begin(parameter) for parameter in params]
            averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            adamw(
                params, [parameter.grad for parameter in params], averages, squares, [], steps, fused=True,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state before the first step, under PyTorch's names."""
        self.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        return self.state[parameter]


class Muon(ParameterGroups):
    """Momentum, orthogonalised (Jordan et al., 2024): every direction of a matrix moves at the same rate.

    Matrices of one shape are stacked and orthogonalised together, in `dtype`. The factor sqrt(max(1, rows / columns))
    is the reference's: it makes the update of a tall matrix as large, for each of its inputs, as that of a square one.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in params:
            by_shape[parameter.shape].append(parameter)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            gradients = [parameter.grad for parameter in group["params"]]
            averages_NRC = self.momentum(group["params"][0], gradients)
            ahead_NRC = self.average_gradients(gradients, averages_NRC, group["momentum"])
            self.move_weights(group["params"], self.orthogonalise(ahead_NRC), **self.rates(group))

    def momentum(self, first: nn.Parameter, gradients: list[Tensor]) -> Tensor:
        """The averaged gradients of the matrices of one shape, which are kept with the first of them."""
        if "momentum" not in self.state[first]:
            self.state[first]["momentum"] = torch.zeros_like(torch.stack(gradients))
        return self.state[first]["momentum"]

    def average_gradients(self, gradients: list[Tensor], averages_NRC: Tensor, momentum: float) -> Tensor:
        """Move the averages towards the gradients, in place; returns the matrices to orthogonalise (Nesterov's)."""
        gradients_NRC = torch.stack(gradients)
        averages_NRC.lerp_(gradients_NRC, 1 - momentum)
        return gradients_NRC.lerp_(averages_NRC, momentum)

    def orthogonalise(self, matrices_NRC: Tensor) -> Tensor:
        return orthogonalise(matrices_NRC, self.dtype)

    def rates(self, group: dict[str, Any]) -> dict[str, float]:
        """By how much the weights of a group shrink, and how far they move along their updates."""
        rows, columns = group["params"][0].shape
        size = math.sqrt(max(1.0, rows / columns))
        return {"decay": 1 - group["lr"] * group["weight_decay"], "rate": group["lr"] * size}

    def move_weights(self, weights: list[Tensor], updates_NRC: Tensor, decay: float, rate: float) -> None:
        """`decay * weight - rate * update` in place of every weight."""
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, list(updates_NRC.to(weights[0].dtype).unbind()), alpha=-rate)


class Optimizer:
    """All parameters of a model; the state is a flat dictionary of tensors, so that a checkpoint needs no pickle."""

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype) -> None:
        self.config = config
        matrices, embeddings, vectors = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                vectors.append(parameter)
            elif "embed_tokens" in name or "lm_head" in name:
                embeddings.append(parameter)
            else:
                matrices.append(parameter)
        self.parameters = matrices + embeddings + vectors
        self.optimizers: list[ParameterGroups] = []
        adamw_groups: list[dict[str, Any]] = [
            {"params": embeddings, "weight_decay": 0.0},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if config.kind == "muon":
            self.optimizers.append(self.new_muon(matrices, dtype))
        else:
            adamw_groups.append({"params": matrices, "weight_decay": config.weight_decay})
        self.optimizers.append(AdamW(adamw_groups, lr=config.learning_rate, betas=config.betas, eps=1e-10))
        self.peaks = [group["lr"] for group in self.groups()]
        self.factor = 1.0

    def new_muon(self, matrices: list[nn.Parameter], dtype: torch.dtype) -> Muon:
        c = self.config
        return Muon(matrices, c.matrix_learning_rate, c.momentum, c.weight_decay, dtype)

    def groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to this share of its peak."""
        self.factor = factor
        for group, peak in zip(self.groups(), self.peaks, strict=True):
            group["lr"] = peak * factor

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients as one vector."""
        return torch.nn.utils.get_total_norm(gradients)

    def step(self) -> Tensor:
        """Clip the gradient, move the weights, clear the gradient; returns its norm before clipping."""
        norm = self.total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        # Reading the norm is free on a CPU; on a GPU it would force a synchronisation.
        if self.config.grad_clip and not (norm.device.type == "cpu" and norm <= self.config.grad_clip):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def reset(self) -> None:
        """Forget all momentum and averages."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by `optimizer.parameter.entry`, in the fixed order of the parameters."""
        return {
            f"{o}.{p}.{key}": value
            for o, optimizer in enumerate(self.optimizers)
            for p, parameter in enumerate(optimizer.parameters())
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def parameter_of(self, name: str) -> nn.Parameter:
        """The parameter that a state of this name belongs to; MinitfError if there is none."""
        try:
            o, p, _ = name.split(".", 2)
            return self.optimizers[int(o)].parameters()[int(p)]
        except (ValueError, IndexError):
            raise MinitfError(f"the optimizer has no state {name}: the checkpoint is of another model") from None

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor to read the state `name` into."""
        self.parameter_of(name)
        return torch.empty(shape, dtype=dtype)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, for a model and config of the same shape (else ValueError)."""
        for o, optimizer in enumerate(self.optimizers):
            for p, parameter in enumerate(optimizer.parameters()):
                prefix = f"{o}.{p}."
                for name in [name for name in state if name.startswith(prefix)]:
                    value = state[name]
                    if value.dim() >= parameter.dim() > 0 and value.shape[-parameter.dim() :] != parameter.shape:
                        raise ValueError(f"optimizer state {name} has shape {tuple(value.shape)}")
                    optimizer.state[parameter][name.removeprefix(prefix)] = self.place(value, parameter)

    def place(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A copy of loaded state where `parameter` is."""
        return value.to(parameter.device).clone()
