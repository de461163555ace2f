"""The group of processes that train one model together, and its collective operations.

torchrun starts them and describes the group in the environment. In a group of one process every operation returns at
once, and torch.distributed is not even imported.
"""

import atexit
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from minitf.errors import MinitfError

# The others wait while rank 0 writes a checkpoint or downloads gigabytes of text; that is no failure. A process that
# dies is noticed at once, by its closed connections and by torchrun.
TIMEOUT = timedelta(hours=6)
# Texts of the errors of a lost connection: gloo raises plain RuntimeErrors.
LOST_CONNECTION = (
    "connection closed by peer",
    "connection reset",
    "gloo",
    "nccl",
    "socket",
    "broken pipe",
    "timed out",
)


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `size`, the `local_rank`-th of `local_size` on its machine.

    Methods are collective operations, called by all ranks together, unless they say otherwise.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, repr=False)  # torchrun's key-value store, which outlives a restart

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and saves (a local property)."""
        return self.rank == 0

    def rows_of(self, count: int) -> slice:
        """This rank's part of `count` rows, a multiple of `size` (a local method)."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, in all ranks: anything JSON can hold."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        if not self.is_main:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in at least one rank."""
        return flag if self.size == 1 else self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """Element by element sums over the ranks, in float64."""
        if self.size == 1:
            return values
        total: list[float] = self._reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks; `value` may be overwritten."""
        return value if self.size == 1 else self._reduce(value) / self.size

    def _reduce(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(value)
        return value

    def gather(self, row: Tensor) -> Tensor:
        """CPU tensors of one shape from all ranks, stacked along a new first axis."""
        if self.size == 1:
            return row[None]
        import torch.distributed as dist

        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row.contiguous())
        return torch.stack(rows)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.any(False)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank of each machine runs the block before the others do, who find its results on disk."""
        if self.size > 1 and self.local_rank:
            self.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            self.barrier()

    def scatter_work(
        self, work: Callable[[Tensor], Tensor], items_NRC: Tensor, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Apply `work`, which returns `dtype`, to N matrices that all ranks hold; each rank works on N / size of them.

        Returns a function that waits for the results, which all ranks receive: communication overlaps with what the
        caller does in between.
        """
        if self.size == 1:
            result_NRC = work(items_NRC)
            return lambda: result_NRC
        import torch.distributed as dist

        num_own = -(-len(items_NRC) // self.size)
        own_nRC = items_NRC[self.rank * num_own : (self.rank + 1) * num_own]
        done_nRC = own_nRC.new_zeros((num_own, *own_nRC.shape[1:]), dtype=dtype)
        if len(own_nRC):
            done_nRC[: len(own_nRC)] = work(own_nRC)
        all_done_NRC = done_nRC.new_empty((self.size * num_own, *done_nRC.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        transfer = gather(all_done_NRC, done_nRC, async_op=True)

        def result() -> Tensor:
            transfer.wait()
            return all_done_NRC[: len(items_NRC)]

        return result

    def scatter_row_work(
        self, work: Callable[[Tensor], Tensor], rows_NrC: Tensor, num_rows: int, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """`scatter_work` for N matrices of `num_rows` rows of which each rank holds some, `rows_NrC`.

        Rows are sharded as by FSDP2: ceil(num_rows / size) per rank, fewer or none in the last. Each rank receives the
        rows of its matrices and sends the results back: 2 / size of a matrix's bytes per rank.
        """
        import torch.distributed as dist

        N, r, C = rows_NrC.shape
        num_own, height = -(-N // self.size), -(-num_rows // self.size)
        sent = rows_NrC.new_zeros((self.size * num_own, height, C), dtype=dtype)
        sent[:N, :r] = rows_NrC
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        whole = received.view(self.size, num_own, height, C).transpose(0, 1).reshape(num_own, self.size * height, C)
        own = whole[: max(0, min(num_own, N - self.rank * num_own)), :num_rows]
        if own.numel():
            own.copy_(work(own.contiguous()))
        back = whole.view(num_own, self.size, height, C).transpose(0, 1).reshape(sent.shape)
        results = torch.empty_like(back)
        transfer = dist.all_to_all_single(results, back, async_op=True)

        def result() -> Tensor:
            transfer.wait()
            return results[:N, :r]

        return result

    def set_for_restart(self, name: str, value: str) -> None:
        """Store a value that survives a restart by torchrun after a failure. A local method; only rank 0 stores."""
        if self.store is not None and self.is_main:
            self.store.set(_key(name), value)

    def get_from_before_restart(self, name: str) -> str | None:
        """The value that the processes before this restart stored, or None; the same in all ranks."""
        if self.store is None:
            return None
        known = self.store.get(_key(name)).decode() if self.is_main and self.store.check([_key(name)]) else None
        return self.broadcast(known)  # type: ignore[no-any-return]


SINGLE = ProcessGroup()


def _key(name: str) -> str:
    return f"minitf/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{name}"


def started_by_torchrun() -> bool:
    """Whether the environment describes a process group."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the process group that torchrun has started, or yield SINGLE.

    An error in one process ends all. The process it happened in reports it, in a line that names the process; the
    others, who only lose the connection, exit without a message.
    """
    if not started_by_torchrun():
        yield SINGLE
        return
    group = ProcessGroup(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        _torchrun_store(),
    )
    if group.size == 1:
        yield group
        return
    import torch.distributed as dist

    _initialise(group)
    try:
        yield group
    except Exception as error:
        _fail(group, error)
    dist.destroy_process_group()
    atexit.register(_leave)


def _leave() -> None:
    """Run the exit handlers, then exit without finalizing the interpreter.

    gloo's threads outlive the process group. One that releases a tensor during finalization aborts the process
    (https://github.com/pytorch/pytorch/issues/190489), and torchrun reports a finished run as failed.
    """
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if hasattr(sys, "last_value") else 0)  # set by an uncaught exception


def _torchrun_store() -> Any:
    """torchrun's key-value store, if it keeps one across restarts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]


def _initialise(group: ProcessGroup) -> None:
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(group.local_rank)
    if group.store is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    prefix = _agree_on_prefix(group.store, group.rank, group.size)
    store = dist.PrefixStore(prefix, group.store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=group.rank, world_size=group.size)


def _agree_on_prefix(store: Any, rank: int, size: int) -> str:
    """A prefix for these processes' keys in torchrun's store, which still holds the addresses from before a restart.

    Each rank asks under a fresh random name; rank 0 answers until all have confirmed.
    """
    if rank:
        name = secrets.token_hex(8)
        store.set(_key(f"asks/{rank}"), name)
        prefix: str = store.get(_key(f"answer/{name}")).decode()  # blocks until rank 0 has answered
        store.set(f"{prefix}/knows/{rank}", "")
        return prefix
    prefix, waiting = _key(secrets.token_hex(8)), set(range(1, size))
    while waiting:
        for other in waiting:
            if store.check([_key(f"asks/{other}")]):
                store.set(_key(f"answer/{store.get(_key(f'asks/{other}')).decode()}"), prefix)
        waiting = {other for other in waiting if not store.check([f"{prefix}/knows/{other}"])}
        time.sleep(0.01)
    return prefix


def _fail(group: ProcessGroup, error: Exception) -> None:
    """Re-raise an error with the number of the process; SystemExit if another process has failed first."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        first = group.store is None or group.store.add(_key(f"failed/{attempt}"), 1) == 1
    except RuntimeError:  # the store's machine is gone
        first = True
    if not first:
        raise SystemExit(1) from None
    if isinstance(error, MinitfError):
        raise type(error)(f"{error} (process {group.rank} of {group.size})") from None
    if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST_CONNECTION):
        raise MinitfError(
            f"process {group.rank} of {group.size} lost another one: it was killed, or its machine is gone; continue "
            "with resume=latest"
        ) from None
    raise error
