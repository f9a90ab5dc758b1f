"""The optimizer: which parameter gets which update rule, where and when, and what is sent for it.

What a rule computes is in `update_rules`, how tensors travel in `comms`. RECIPE section 4.
B matrices of M × N in a bank, R rows of C columns in a table, V vocabulary, D model, W ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from speedrun.comms import Comms, Pending, rows_per_rank, sent_bytes, sparse_sent_bytes
from speedrun.config import AdamRow, ConfigError, MuonRow, OptimConfig
from speedrun.normuon import NorMuon as NorMuon  # public under this name
from speedrun.ops.transpose import ADD_DTYPES, transpose, transpose_add_
from speedrun.schedule import StepPlan
from speedrun.step_graph import StepGraphs, StepNumbers
from speedrun.update_rules import RULES, Shard, UpdateRule

Kind = Literal["replicated", "matrices", "rows", "columns"]
HEAD, EMBED = "lm_head", "embed"  # (D, V) and (V, D): one parameter while a plan says `tied`


@dataclass(frozen=True)
class Placement:
    """Where a parameter is updated: by every rank, or each of its rows by the rank that owns it.

    matrices: a bank (…, M, N) has B matrices for rows; rows: a table (…, C) has R; columns: the
    head has those of its transpose, V like the embedding.
    """

    name: str
    param: nn.Parameter
    row: MuonRow | AdamRow
    kind: Kind
    sparse: bool = False  # only rows that a rank touched are sent to their owners

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """(B, M, N), (R, C) or (V, D); of replicated parameters that of the parameter."""
        shape = tuple(self.param.shape)
        if self.kind == "replicated":
            return shape
        if self.kind == "columns":
            return shape[::-1]
        size = shape[-2:] if self.kind == "matrices" else shape[-1:]
        return (math.prod(shape[: -len(size)]), *size)

    def is_due(self, adam: bool, tied: bool) -> bool:
        """Whether a step updates it: banks always, others by `adam`; tied, the head alone."""
        return self.kind == "matrices" or (adam and not (tied and self.name == EMBED))


def placements(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, world_size: int
) -> list[Placement]:
    """All parameters, in the order of communication and of work.

    That is: the small ones, which share a message; muon_table row by row; adam_table row by row. So
    gradients of the large tables are on their way while matrices are orthogonalised.
    ConfigError: a parameter matches no row, or two, or a row that can't be its.
    """
    params = dict(named_parameters)
    rows: list[MuonRow | AdamRow] = [*config.muon_table, *config.adam_table]
    pair = _tied_pair(params)
    found = []
    for name, param in params.items():
        row = _only_row(name, rows)
        kind: Kind = "rows"
        sparse = False
        if isinstance(row, MuonRow):
            kind = "matrices"
            if param.dim() < 2:
                raise ConfigError(
                    f"optim.muon_table: {row.name!r} matches {name!r}, which has shape "
                    f"{tuple(param.shape)} and is no matrix: give it a row in optim.adam_table"
                )
        elif name in pair:
            kind = "columns" if name == HEAD else "rows"
        elif param.dim() < 2 or param.numel() < config.replicate_below:
            kind = "replicated"
        elif world_size > 1 and row.sparse:
            sparse = 0 < config.sparse_rows_threshold <= math.prod(param.shape[:-1])
        found.append(Placement(name, param, row, kind, sparse))
    return sorted(found, key=lambda place: (place.kind != "replicated", rows.index(place.row)))


def _only_row(name: str, rows: Sequence[MuonRow | AdamRow]) -> MuonRow | AdamRow:
    matches = [row for row in rows if fnmatchcase(name, row.name)]
    if len(matches) == 1:
        return matches[0]
    tables = "optim.muon_table or optim.adam_table"
    if not matches:
        raise ConfigError(f"parameter {name!r} needs a row in {tables}")
    names = ", ".join(repr(row.name) for row in matches)
    raise ConfigError(f"parameter {name!r} matches {names} in {tables}: it may have one row only")


def _tied_pair(params: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of head and embedding where they could be one parameter, else none."""
    head, embed = params.get(HEAD), params.get(EMBED)
    if head is None or embed is None or head.dtype not in ADD_DTYPES:
        return ()
    return (HEAD, EMBED) if (head.shape, head.dtype) == (embed.shape[::-1], embed.dtype) else ()


class ReplicatedParams:
    """Small parameters: their gradients share a message, and every rank updates all of them."""

    def __init__(self, places: Sequence[Placement], config: OptimConfig, comms: Comms) -> None:
        self.places, self.comms = places, comms
        self.rules = {place.name: _rule(place, config, place.param.data, 0) for place in places}

    def reduce(self, tied: bool) -> None:
        self.pending = self.comms.all_reduce_([_gradient(place.param) for place in self.places])

    def shards(self, tied: bool) -> list[Shard]:
        return [
            Shard(self.rules[place.name], place.param.data, grad)
            for place, grad in zip(self.places, self.pending.wait(), strict=True)
        ]

    def send(self) -> None:
        """Every rank has updated them."""

    def finish(self, tied: bool) -> list[nn.Parameter]:
        return [place.param for place in self.places]


class ShardedParam:
    """A parameter of which each rank updates its own rows, with optimizer state for these alone."""

    def __init__(self, place: Placement, config: OptimConfig, comms: Comms) -> None:
        self.places, self.param, self.comms = [place], place.param, comms
        self.rows_shape, self.own = place.rows_shape, comms.own_rows(place.rows_shape[0])
        weight = self.rows_of(place.param.data)[self.own]
        self.rules = {place.name: _rule(place, config, weight, self.own.start)}
        self.touched: list[Tensor] | None = [] if place.sparse else None

    def rows_of(self, x: Tensor) -> Tensor:
        """The parameter or its gradient as rows, a view."""
        return x.view(self.rows_shape)

    def reduce(self, tied: bool) -> None:
        """Send the gradient to the owners of its rows."""
        if self.touched is not None:
            self.pending = self._reduce_touched_rows()
        else:
            self.pending = self.comms.reduce_scatter(self.rows_of(_gradient(self.param)))

    def _reduce_touched_rows(self) -> Pending:
        if self.param.grad is not None and not self.touched:
            name = self.places[0].name
            raise RuntimeError(
                f"{name!r} is sent by rows and has a gradient, but its rows are not known: call "
                f"optimizer.touched({name!r}, rows) for each micro-batch, or set "
                "optim.sparse_rows_threshold=0"
            )
        grad_RC = self.rows_of(_gradient(self.param))
        nothing = grad_RC.new_empty(0, dtype=torch.int32)
        return self.comms.reduce_scatter_rows(grad_RC, torch.cat([nothing, *(self.touched or ())]))

    def shards(self, tied: bool) -> list[Shard]:
        """The own rows, with the sum of all ranks' gradients, which is waited for."""
        self.rows = self.rows_of(self.param.data)
        (rule,) = self.rules.values()
        return [Shard(rule, self.rows[self.own], self.pending.wait())]

    def send(self) -> None:
        """The own rows, updated, to all ranks."""
        self.pending = self.comms.all_gather_(self.rows)

    def finish(self, tied: bool) -> list[nn.Parameter]:
        """Receive the other ranks' rows; gives the parameters whose gradients are used up."""
        self.pending.wait()
        if self.touched is not None:
            self.touched.clear()
        return [self.param]


class HeadParam(ShardedParam):
    """lm_head (D, V), of which each rank updates columns: rows (V, D) like those of embed.

    So, while they are tied, the sum of both gradients is one sum of rows, and when they part, each
    rank has the moments that embed's rows need.
    """

    def __init__(
        self, place: Placement, embed: nn.Parameter, config: OptimConfig, comms: Comms
    ) -> None:
        super().__init__(place, config, comms)
        self.embed = embed

    def rows_of(self, x: Tensor) -> Tensor:
        return x.mT

    def reduce(self, tied: bool) -> None:
        grad_DV = _gradient(self.param)
        if tied:
            grad_VD = transpose_add_(_gradient(self.embed), grad_DV)
        else:
            grad_VD = transpose(grad_DV)
        self.pending = self.comms.reduce_scatter(grad_VD)

    def shards(self, tied: bool) -> list[Shard]:
        """Tied, the rows are received as embed's; else they only pass through a tensor like it."""
        self.rows = self.embed.data if tied else torch.empty_like(self.embed)
        own = self.rows[self.own]
        own.copy_(transpose(self.param.data[:, self.own]))
        (rule,) = self.rules.values()
        return [Shard(rule, own, self.pending.wait())]

    def finish(self, tied: bool) -> list[nn.Parameter]:
        self.param.data.copy_(transpose(self.pending.wait()))
        return [self.param, self.embed] if tied else [self.param]


Item = ReplicatedParams | ShardedParam


class StateTensor(NamedTuple):
    """A live tensor that one step leaves to the next.

    num_rows: of the whole, where `tensor` is the rows of it that this rank owns. per_rank: each
    rank has another; else all have the same.
    """

    tensor: Tensor
    num_rows: int | None = None
    per_rank: bool = False


def _rule(place: Placement, config: OptimConfig, weight: Tensor, first: int) -> UpdateRule:
    name = config.matrix_rule if isinstance(place.row, MuonRow) else config.vector_rule
    return RULES[name](place.row, config, weight, first)


def _gradient(param: nn.Parameter) -> Tensor:
    """The gradient; a missing one is zero."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def _share_launches(item: Item, other: Item) -> bool:
    """Two banks whose products over the short side can be one: those of attention and MLP."""
    a, b = item.places[0], other.places[0]
    if not a.kind == b.kind == "matrices" or a.param.dtype != b.param.dtype:
        return False
    return min(a.rows_shape[1:]) == min(b.rows_shape[1:])


class Optimizer:
    """Every parameter of a model, by the row of the tables that matches its name.

    `buffers`: gives what else a step changes in the model, by name, for `state` only. Raises
    ConfigError as `placements` does.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        comms: Comms,
        buffers: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
    ) -> None:
        self.buffers = buffers
        params = dict(named_parameters)
        places = placements(params.items(), config, comms.world_size)
        small = [place for place in places if place.kind == "replicated"]
        items: list[Item] = [ReplicatedParams(small, config, comms)] if small else []
        for place in places[len(small) :]:
            if place.kind == "columns":
                items.append(HeadParam(place, params[EMBED], config, comms))
            else:
                items.append(ShardedParam(place, config, comms))
        # The order of communication and of work: that of this list. What is grouped in it is
        # updated together.
        self.order: list[list[Item]] = []
        for item in items:
            if self.order and _share_launches(self.order[-1][0], item):
                self.order[-1].append(item)
            else:
                self.order.append([item])
        self.params = params
        self.rules = {name: rule for item in items for name, rule in item.rules.items()}
        self.can_tie = any(place.kind == "columns" for place in places)
        self.sparse = {
            item.places[0].name: item.touched
            for item in items
            if isinstance(item, ShardedParam) and item.touched is not None
        }
        device = next(iter(params.values())).device if params else torch.device("cpu")
        self.numbers = StepNumbers(self.rules.values(), device)
        self.graphs = None
        if config.cuda_graph and device.type == "cuda":
            self.graphs = StepGraphs("optim.cuda_graph")
        self.keeps_gradients = self.graphs is not None

    def keep_gradients(self) -> None:
        """From now on a gradient that is used up becomes zero where it is, instead of going."""
        self.keeps_gradients = True

    def touched(self, name: str, rows: Tensor) -> None:
        """Rows of table `name` in which a micro-batch leaves a gradient; any shape, integers.

        For tables whose row of the config is `sparse`; no harm done where all rows are sent.
        """
        if name in self.sparse:
            self.sparse[name].append(rows.flatten())

    @torch.no_grad()
    def step(self, plan: StepPlan) -> None:
        """Sum the gradients that are due over the ranks, update their parameters, clear them.

        The other gradients stay and add up. A missing gradient counts as zero. A parameter's
        update runs while gradients of the next ones and weights of the ones before are on their
        way.
        """
        if (plan.tied or plan.split) and not self.can_tie:
            raise ConfigError(
                f"schedule.untie_frac: to be tied, {EMBED} (V, D) and {HEAD} (D, V) must both be "
                "in optim.adam_table and of one type, 16 bits or float32; or set it to 0"
            )
        due = [group for group in self.order if group[0].places[0].is_due(plan.adam, plan.tied)]
        self.numbers.write([r for group in due for i in group for r in i.rules.values()], plan)
        if self.graphs is None:
            self._work(due, plan.tied)
        else:
            # What is sent by rows makes the host wait for their number, so it stays outside.
            outside = [group for group in due if self.sparse.keys() & group[0].rules.keys()]
            inside = [group for group in due if group not in outside]
            kind = (plan.adam, plan.tied)
            self.graphs.run(kind, lambda: self._work(inside, plan.tied))
            self._work(outside, plan.tied)
        # Written through .data: tells who keeps copies of a parameter (`Fp8HeadState`).
        increment_version([place.param for group in due for i in group for place in i.places])
        self._split(plan)

    @torch.no_grad()
    def leave_out(self, plan: StepPlan) -> None:
        """In place of `step`: no update, and all gradients go, those that wait for Adam too."""
        self._forget_all()
        self._split(plan)

    def _split(self, plan: StepPlan) -> None:
        """Behind a step that parts head and embedding: embed goes on from where they were one."""
        if plan.split:
            for name, tensor in self.rules[EMBED].state.items():
                tensor.copy_(self.rules[HEAD].state[name])

    def _work(self, due: Sequence[Sequence[Item]], tied: bool) -> None:
        """What the device does in a step: the same for every step of a kind.

        `reduce` may come earlier: a backward pass could call it as soon as a gradient is complete.
        """
        for group in due:
            for item in group:
                item.reduce(tied)
        for group in due:
            shards = [shard for item in group for shard in item.shards(tied)]
            type(shards[0].rule).update(shards)
            for item in group:
                item.send()
        for group in due:
            for item in group:
                for param in item.finish(tied):
                    self._forget(param)

    def state(self) -> dict[str, StateTensor]:
        """All that a step leaves to the next but gradients, by name: the one list for the warm-up,
        which puts it back, and for checkpoints.

        Buffers of the model itself are the same on every rank; those of modules inside it, which
        are FP8's scales, belong to the rank. What a step takes from its number alone is no state:
        rates, momentum, windows, rotary frequencies, the score scale, whether head and embedding
        are tied.
        """
        found = {f"model.{name}": StateTensor(param.data) for name, param in self.params.items()}
        for item in (item for group in self.order for item in group):
            num_rows = item.rows_shape[0] if isinstance(item, ShardedParam) else None
            for name, rule in item.rules.items():
                for key, t in rule.state.items():
                    found[f"optim.{name}.{key}"] = StateTensor(t, num_rows if t.dim() else None)
        for name, buffer in self.buffers():
            found[f"model.{name}"] = StateTensor(buffer, per_rank="." in name)
        return found

    def snapshot(self) -> list[Tensor]:
        """Copies of `state`, for `restore`; taken before the warm-up."""
        return [t.clone() for t, *_ in self.state().values()]

    @torch.no_grad()
    def restore(self, snapshot: Iterable[Tensor]) -> None:
        """Put a snapshot back, bitwise, and forget gradients."""
        for (t, *_), saved in zip(self.state().values(), snapshot, strict=True):
            t.copy_(saved)
        increment_version(self.params.values())
        self._forget_all()

    def unused_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients that wait for a step to come, and the rows that they touched.

        "grad.NAME" like the parameter, "touched.NAME" (N,) of row numbers; live or new tensors.
        """
        found = {}
        for name, param in self.params.items():
            if param.grad is not None and not (self.keeps_gradients and not param.grad.any()):
                found[f"grad.{name}"] = param.grad
        touched = {f"touched.{name}": torch.cat(rows) for name, rows in self.sparse.items() if rows}
        return found | touched

    @torch.no_grad()
    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Those of `unused_gradients`, from any device, as a backward pass would add them."""
        for key, t in gradients.items():
            kind, _, name = key.partition(".")
            param = self.params[name]
            t = t.to(param.device, copy=True)
            if kind == "touched":
                self.touched(name, t)
            elif param.grad is None:
                param.grad = t
            else:
                param.grad.add_(t)

    def _forget_all(self) -> None:
        for param in self.params.values():
            self._forget(param)
        for rows in self.sparse.values():
            rows.clear()

    def _forget(self, param: nn.Parameter) -> None:
        """Its gradient. Graphs read gradients where they were at the capture: these keep theirs."""
        if not self.keeps_gradients:
            param.grad = None
        elif param.grad is not None:
            param.grad.zero_()


def communication_bytes(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    world_size: int,
    *,
    adam: bool = True,
    tied: bool = False,
    sparse_rows: Mapping[str, int] | None = None,
) -> Counter[str]:
    """Bytes that a rank sends in one step, by collective, as `Comms.sent` counts them.

    named_parameters: may be on the meta device. adam, tied: the plan's. sparse_rows: for each table
    that is sent by rows, how many of the rows that the rank touched belong to others. ValueError
    where such a table is missing there.
    """
    sparse_rows_to_others = sparse_rows or {}
    bytes_sent: Counter[str] = Counter()
    replicated: Counter[torch.dtype] = Counter()
    for place in placements(named_parameters, config, world_size):
        if not place.is_due(adam, tied):
            continue
        num_rows, *row_shape = place.rows_shape or (1,)
        row_bytes = math.prod(row_shape) * place.param.itemsize
        if place.kind == "replicated":
            replicated[place.param.dtype] += num_rows * row_bytes
            continue
        message = rows_per_rank(num_rows, world_size) * world_size * row_bytes
        bytes_sent["all_gather"] += sent_bytes("all_gather", message, world_size)
        if not place.sparse:
            bytes_sent["reduce_scatter"] += sent_bytes("reduce_scatter", message, world_size)
        elif place.name in sparse_rows_to_others:
            rows_to_others = sparse_rows_to_others[place.name]
            bytes_sent["all_to_all"] += sparse_sent_bytes(rows_to_others, row_bytes, world_size)
        else:
            raise ValueError(f"{place.name!r} is sent by rows: sparse_rows must have their number")
    for message in replicated.values():
        bytes_sent["all_reduce"] += sent_bytes("all_reduce", message, world_size)
    return +bytes_sent
