"""Collectives between ranks, as handles. World size 1 is the same code path, without a group.

R rows of a tensor are dealt to the W ranks in order, S = ⌈R/W⌉ to each; the last ranks may have
fewer, or none. Where W does not divide R, the message is padded with rows of zeros, not the tensor.

Every collective used here exists for NCCL and, on CPUs, for gloo (float32, float64, bfloat16,
int32 and int64; no 16-bit integers): nothing is emulated, and no backend is asked for by name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Default arguments in this module keep the group that exists when it is first imported.
# torch.compile imports it; were that after init_process_group, gloo's threads would outlive the
# group and abort the process if they let a tensor go while the interpreter ends.
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 gave these two other names, and warns about the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ROW_NUMBER = torch.int32  # how row numbers travel in the sparse exchange


def sent_bytes(kind: str, message_bytes: int, world_size: int) -> int:
    """Bytes that each rank of a ring sends in a collective on `message_bytes`, padding included.

    kind: "reduce_scatter" or "all_gather", whose message is the whole tensor; "all_reduce" is one
    after the other.
    """
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * message_bytes * (world_size - 1) // world_size


def sparse_sent_bytes(rows_to_others: int, row_bytes: int, world_size: int) -> int:
    """Bytes that a rank sends in `reduce_scatter_rows`: counts, row numbers and rows."""
    counts = torch.int64.itemsize * (world_size - 1)
    return counts + rows_to_others * (ROW_NUMBER.itemsize + row_bytes)


def rows_per_rank(num_rows: int, world_size: int) -> int:
    """S: of every rank but the last ones."""
    return -(-num_rows // world_size)


@dataclasses.dataclass
class Calls:
    """Where a rank is among its collectives, for who watches it from another thread."""

    num_begun: int = 0
    last: str | None = None  # that was begun
    waiting_for: str | None = None  # by the host; NCCL's are waited for by the device


class Pending:
    """A collective on its way. `wait()`, called once, gives its result.

    `messages` are kept until then: they may still be read or written.
    """

    def __init__(
        self,
        result: Callable[[], Any],
        works: Sequence[dist.Work] = (),
        messages: Sequence[Tensor] = (),
        calls: Calls | None = None,
    ) -> None:
        self._result, self._works, self._messages = result, works, messages
        self._calls = calls
        self._name = calls.last if calls else None

    def wait(self) -> Any:
        if self._works:
            self._calls.waiting_for = self._name
        for work in self._works:
            work.wait()
        if self._works:
            self._calls.waiting_for = None
        return self._result()


class Comms:
    """The ranks of a run: `rank` of `world_size`. All of them call collectives in one order.

    `sent`: bytes that this rank sent so far, by collective, as `sent_bytes` counts them.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.sent: Counter[str] = Counter()
        self.calls = Calls()

    def own_rows(self, num_rows: int) -> slice:
        """This rank's of a tensor's rows."""
        size = rows_per_rank(num_rows, self.world_size)
        return slice(min(self.rank * size, num_rows), min((self.rank + 1) * size, num_rows))

    def reduce_scatter(self, x: Tensor) -> Pending:
        """Gives this rank's rows of the sum of x (R, …) over the ranks. x must not change yet."""
        if self.world_size == 1:
            return Pending(lambda: x)
        size, rows = rows_per_rank(len(x), self.world_size), self.own_rows(len(x))
        message = _padded(x.contiguous(), size * self.world_size)
        own = message.new_empty(size, *x.shape[1:])
        self._begin("reduce_scatter", message)
        work = _reduce_scatter(own, message, async_op=True)
        return Pending(lambda: own[: rows.stop - rows.start], [work], [message], self.calls)

    def all_gather_(self, x: Tensor) -> Pending:
        """Fills x (R, …), contiguous, in place with the own rows of every rank; gives x."""
        if self.world_size == 1:
            return Pending(lambda: x)
        own, size = x[self.own_rows(len(x))], rows_per_rank(len(x), self.world_size)
        fits = size * self.world_size == len(x)
        message = x if fits else x.new_empty(size * self.world_size, *x.shape[1:])
        self._begin("all_gather", message)
        work = _all_gather(message, _padded(own, size), async_op=True)
        return Pending(lambda: x if fits else x.copy_(message[: len(x)]), [work], [own], self.calls)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> Pending:
        """Sums each tensor over the ranks, in place. One message for each dtype among them."""
        if self.world_size == 1:
            return Pending(lambda: tensors)
        groups = []
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            message = torch.cat([t.reshape(-1) for t in same])
            self._begin("all_reduce", message)
            groups.append((same, message, dist.all_reduce(message, async_op=True)))

        def result() -> Sequence[Tensor]:
            for same, message, _ in groups:
                pieces = message.split([t.numel() for t in same])
                for t, piece in zip(same, pieces, strict=True):
                    t.copy_(piece.view_as(t))
            return tensors

        return Pending(result, [work for *_, work in groups], calls=self.calls)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """`all_reduce_`, waited for."""
        self.all_reduce_(tensors).wait()

    def reduce_scatter_rows(self, x_RC: Tensor, touched: Tensor) -> Pending:
        """`reduce_scatter` of an x that is zero outside the rows `touched` of this rank.

        touched: row numbers of any integer type, in any order, repeated or not. Only these rows
        travel, with their numbers, each to its owner. The host waits for the device once, since
        it has to know how many.
        """
        if self.world_size == 1:
            return Pending(lambda: x_RC)
        size, own_rows = rows_per_rank(len(x_RC), self.world_size), self.own_rows(len(x_RC))
        numbers = touched.to(ROW_NUMBER).unique()  # sorted: by owner
        owners = torch.arange(self.world_size + 1, dtype=ROW_NUMBER, device=numbers.device) * size
        counts = torch.searchsorted(numbers, owners).diff()
        received_counts = torch.empty_like(counts)
        self._call("all_to_all of row counts", dist.all_to_all_single, received_counts, counts)
        send, receive = counts.tolist(), received_counts.tolist()
        works, received, messages = [], [], [numbers, x_RC[numbers]]
        for message in messages:
            self._name("all_to_all", message)
            received.append(message.new_empty(sum(receive), *message.shape[1:]))
            works.append(
                dist.all_to_all_single(received[-1], message, receive, send, async_op=True)
            )
        self.sent["all_to_all"] += sparse_sent_bytes(
            len(numbers) - send[self.rank], x_RC.shape[1] * x_RC.itemsize, self.world_size
        )

        def result() -> Tensor:
            own = x_RC.new_zeros(own_rows.stop - own_rows.start, x_RC.shape[1])
            # One sender after the other: none sends a row twice, so that sums keep their order.
            for index, rows in zip(*(part.split(receive) for part in received), strict=True):
                own.index_add_(0, index - own_rows.start, rows)
            return own

        return Pending(result, works, messages, self.calls)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Small picklable objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._call("all_gather of objects", dist.all_gather_object, values, value)
        return values

    def host_group(self) -> dist.ProcessGroup | None:
        """A group of all ranks for another thread's exchanges on the host; None for one rank."""
        return None if self.world_size == 1 else dist.new_group(backend="gloo")

    def _begin(self, kind: str, message: Tensor) -> None:
        self._name(kind, message)
        self.sent[kind] += sent_bytes(kind, message.nbytes, self.world_size)

    def _name(self, kind: str, message: Tensor) -> None:
        dtype = str(message.dtype).removeprefix("torch.")
        self.calls.num_begun += 1
        self.calls.last = f"{kind} of {tuple(message.shape)} {dtype}"

    def _call(self, name: str, collective: Callable, *tensors: Any) -> None:
        """One that the host waits for."""
        self.calls.num_begun += 1
        self.calls.last = self.calls.waiting_for = name
        collective(*tensors)
        self.calls.waiting_for = None


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """`Comms.gather_objects` in a group of its own, such as `Comms.host_group`."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _padded(x: Tensor, num_rows: int) -> Tensor:
    """x (R, …), or a copy with rows of zeros behind it where `num_rows` are more."""
    missing = num_rows - len(x)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
