"""The processes that train one model together: who is who, and what they tell each other.

torchrun starts them and says so in the environment. A process on its own is a group of one, for which everything here
is nothing: torch.distributed is not even imported.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from minitf.errors import MinitfError

# The first process writes checkpoints and pictures, or fetches gigabytes of text, while the others wait for it. That is
# no failure; a process that ends is noticed at once, by its closed connections and by torchrun.
PATIENCE = timedelta(hours=6)
# What a lost connection looks like; gloo raises plain RuntimeErrors.
LOST = ("connection closed by peer", "connection reset", "gloo", "nccl", "socket", "broken pipe", "timed out")


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `size`, the `local_rank`-th of `local_size` on its machine. All methods are for all at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, repr=False)  # torchrun's key-value store, which outlives a restart

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, saves and looks."""
        return self.rank == 0

    def rows_of(self, count: int) -> slice:
        """This process's part of `count` rows, which `size` divides."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def broadcast(self, value: Any) -> Any:
        """What the first process says, for all: anything JSON has a notation for."""
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
        """Whether the flag is up in at least one process."""
        return flag if self.size == 1 else self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """The sums over the processes, in float64."""
        if self.size == 1:
            return values
        total: list[float] = self._reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, of a tensor that may be overwritten."""
        return value if self.size == 1 else self._reduce(value) / self.size

    def _reduce(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(value)
        return value

    def gather(self, row: Tensor) -> Tensor:
        """The same-shaped tensors of all processes, on the CPU, stacked."""
        if self.size == 1:
            return row[None]
        import torch.distributed as dist

        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row.contiguous())
        return torch.stack(rows)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process of each machine does what is inside before the others do: what it leaves serves them."""
        if self.size > 1 and self.local_rank:
            self.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            self.barrier()

    def scatter_work(
        self, work: Callable[[Tensor], Tensor], items_NRC: Tensor, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """`work` on matrices that all processes hold, each matrix by one of them; `work` returns them in `dtype`.

        Returns a function that waits for the result of all. Between the two calls the results travel.
        """
        if self.size == 1:
            result_NRC = work(items_NRC)
            return lambda: result_NRC
        import torch.distributed as dist

        most = -(-len(items_NRC) // self.size)
        own = items_NRC[self.rank * most : (self.rank + 1) * most]
        done = own.new_zeros((most, *own.shape[1:]), dtype=dtype)
        if len(own):
            done[: len(own)] = work(own)
        all_done = done.new_empty((self.size * most, *done.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        travel = gather(all_done, done, async_op=True)

        def result() -> Tensor:
            travel.wait()
            return all_done[: len(items_NRC)]

        return result

    def scatter_row_work(
        self, work: Callable[[Tensor], Tensor], rows_NrC: Tensor, num_rows: int, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """The same for matrices of which every process holds `rows_NrC`, its part of their `num_rows` rows.

        Rows lie as FSDP2 lays them: ceil(num_rows / size) in each process as far as they reach. They travel to the
        process that works on their matrix, and the results back: 2 / size of a matrix's bytes for each process.
        """
        import torch.distributed as dist

        N, r, C = rows_NrC.shape
        most, height = -(-N // self.size), -(-num_rows // self.size)
        sent = rows_NrC.new_zeros((self.size * most, height, C), dtype=dtype)
        sent[:N, :r] = rows_NrC
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        whole = received.view(self.size, most, height, C).transpose(0, 1).reshape(most, self.size * height, C)
        own = whole[: max(0, min(most, N - self.rank * most)), :num_rows]
        if own.numel():
            own.copy_(work(own.contiguous()))
        back = whole.view(most, self.size, height, C).transpose(0, 1).reshape(sent.shape)
        results = torch.empty_like(back)
        travel = dist.all_to_all_single(results, back, async_op=True)

        def result() -> Tensor:
            travel.wait()
            return results[:N, :r]

        return result

    def remember(self, name: str, value: str) -> None:
        """Leave a word for the processes that torchrun starts in place of these when one has failed."""
        if self.store is not None and self.is_main:
            self.store.set(_key(name), value)

    def remembered(self, name: str) -> str | None:
        """What `remember` was given by the processes before these, or None; the same for all."""
        if self.store is None:
            return None
        known = self.store.get(_key(name)).decode() if self.is_main and self.store.check([_key(name)]) else None
        return self.broadcast(known)  # type: ignore[no-any-return]


SINGLE = ProcessGroup()


def _key(name: str) -> str:
    return f"minitf/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{name}"


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _meet(store: Any, rank: int, size: int) -> str:
    """A name for these processes' part of torchrun's store, which still holds the addresses of those before them.

    Each asks under a name no process had before; the first answers, until all have said that they know.
    """
    if rank:
        name = secrets.token_hex(8)
        store.set(_key(f"asks/{rank}"), name)
        prefix: str = store.get(_key(f"answer/{name}")).decode()  # waits for it
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


@contextmanager
def connected() -> Iterator[ProcessGroup]:
    """Join the processes torchrun has started, if it has.

    An error of one ends all. The one it happened to tells it, in a line that names the process; the others, who only
    find it gone, end in silence.
    """
    if not started_by_torchrun():
        yield SINGLE
        return
    import torch.distributed as dist

    numbers = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")}
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    store = None
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE
        )
    if numbers["WORLD_SIZE"] > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local[0])
        if store is None:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
            own = dist.PrefixStore(_meet(store, rank, size), store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=PATIENCE, store=own, rank=rank, world_size=size)
    group = ProcessGroup(numbers["RANK"], numbers["WORLD_SIZE"], *local, store)
    try:
        yield group
    except Exception as error:
        if group.size == 1:
            raise
        _fail(group, error)
    if group.size > 1:
        dist.destroy_process_group()


def _fail(group: ProcessGroup, error: Exception) -> None:
    """Raise what this process has to say about its error; SystemExit if another was first."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        first = group.store is None or group.store.add(_key(f"failed/{attempt}"), 1) == 1
    except RuntimeError:  # the store went with its machine
        first = True
    if not first:
        raise SystemExit(1) from None
    if isinstance(error, MinitfError):
        raise type(error)(f"{error} (process {group.rank} of {group.size})") from None
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST):
        raise MinitfError(
            f"process {group.rank} of {group.size} lost another one: it was ended from outside, or its machine is "
            "gone; go on with resume=latest"
        ) from None
    raise error
