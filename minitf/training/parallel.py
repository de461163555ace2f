"""How processes hold one model: each a copy of it (ddp), or each a shard of every weight (fsdp).

`single` is neither. Whatever the strategy, `loss` is what a step calls, and `whole` is a model to look at.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minitf.data.batches import Batch
from minitf.distributed.optimizer import DistributedOptimizer
from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.distributed.sharding import whole as full
from minitf.errors import RequestError
from minitf.model import Transformer
from minitf.optim import OptimConfig, Optimizer

STRATEGIES = ("auto", "single", "ddp", "fsdp")


def choose_strategy(name: str, group: ProcessGroup) -> str:
    """Resolve `trainer.strategy`: a process on its own holds the whole model, whatever the name."""
    if group.size == 1:
        return "single"
    if name == "single":
        raise RequestError(
            f"trainer.strategy=single is for one process, and torchrun has started {group.size}: "
            "take ddp, fsdp or auto, or start it without torchrun"
        )
    return "ddp" if name == "auto" else name


def check_batch_size(batch_size: int, group: ProcessGroup) -> None:
    """RequestError where the batch of all cannot be divided."""
    if batch_size % group.size:
        raise RequestError(
            f"trainer.batch_size={batch_size} is that of all processes together: "
            f"it must be a multiple of their number, {group.size}"
        )


class _Loss(nn.Module):
    """The loss as the forward pass of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *batch: Tensor | None) -> Tensor:
        return self.inner.loss(*batch)  # type: ignore[arg-type]


class Parallel:
    """A model in the hands of a group of processes."""

    def __init__(self, model: Transformer, group: ProcessGroup = SINGLE, strategy: str = "single") -> None:
        """`model` is the same in all processes; its `compute_dtype` is set."""
        self.model, self.group, self.strategy = model, group, strategy
        self.ddp: nn.Module | None = None
        self.copy: Transformer | None = None  # fsdp: the whole model, in the first process
        if strategy == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # Blocks are compiled one by one: their gradients arrive, and travel, one by one as it is.
            _set_dynamo(optimize_ddp=False)
            # The table of rotary positions is the same everywhere and stays so. (The option was renamed in torch 2.13.)
            known = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
            self.ddp = DistributedDataParallel(_Loss(model), **options)
        elif strategy == "fsdp":
            shard(model, group)

    def describe(self, batch_size: int) -> str:
        """A description of who does what; empty for a single process."""
        if self.group.size == 1:
            return ""
        device, threads = self.model.device.type, torch.get_num_threads()
        kind = "processes" if device == "cpu" else f"processes on {device}"
        return (
            f"{self.group.size} {kind} by {self.strategy}, {batch_size // self.group.size} of the batch's {batch_size} "
            f"sequences each, {threads} CPU thread{'s' * (threads > 1)} each"
        )

    def new_optimizer(self, config: OptimConfig, dtype: torch.dtype) -> Optimizer:
        """The optimiser of the model; of several processes each orthogonalises its share of the matrices."""
        if self.group.size == 1:
            return Optimizer(self.model, config, dtype)
        return DistributedOptimizer(self.model, config, dtype, self.group)

    def loss(self, *batch: Tensor | None) -> Tensor:
        """`model.loss` of this process's part of a batch."""
        return (self.model.loss if self.ddp is None else self.ddp)(*batch)  # type: ignore[arg-type]

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows of a batch, and what their mean loss counts in the mean over the processes."""
        if self.group.size == 1:
            return batch, 1.0
        own, share = batch.rows(self.group.rows_of(len(batch.inputs_BT)))
        return own, share * self.group.size

    def loss_value(self, ids_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """The value of `model.loss` of a batch, each process working on its rows; the same for all."""
        if self.group.size == 1:
            return self.model.loss(ids_BT, targets_BT, segments_BT).detach()
        batch, share = self.part(Batch(ids_BT, targets_BT, segments_BT))
        return self.group.mean(self.model.loss(*batch[:3]).detach() * share)

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one batch: gradients travel only with the `last` of a step."""
        if self.ddp is not None and not last:
            with self.ddp.no_sync():  # type: ignore[operator]
                yield
            return
        if self.strategy == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def reshard(self) -> None:
        """After forward passes without a backward one: give back the weights that were put together for them."""
        if self.strategy == "fsdp":
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()  # type: ignore[operator]

    def full_model(self) -> Transformer:
        """The model with all its weights, to look at and to save; of use in the first process alone.

        With fsdp it is a copy on the CPU, of the weights as they are now, and all processes must call.
        """
        if self.strategy != "fsdp":
            return self.model
        if self.copy is None:
            with torch.random.fork_rng(devices=[]):  # initialising draws random numbers
                self.copy = Transformer(self.model.config, self.model.vocab_size) if self.group.is_main else self.model
        targets = dict(self.copy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                value = full(parameter)
                if self.group.is_main:
                    targets[name].copy_(value)
        return self.copy


def _set_dynamo(optimize_ddp: bool) -> None:
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = optimize_ddp


def shard(model: Transformer, group: ProcessGroup) -> None:
    """Leave each process its rows of every weight (FSDP2), put together block by block where they are needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.device.type, (group.size,))
    # The blocks cast their weights to the dtype of the activations: cast before they travel, they are half as large.
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
