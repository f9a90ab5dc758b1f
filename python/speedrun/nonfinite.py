"""Which tensor of a step isn't finite first: the step once more, with an eye on each operator.

Slow, since the host waits for every one of them: for a step that went wrong.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speedrun.baseline_model import BaselineGPT, block_forward, summed_loss
from speedrun.layer import layer_forward

PACKAGE = Path(__file__).parent
# What comes from these isn't computed: memory before it is written.
UNWRITTEN = ("aten::empty", "aten::new_empty")
# Masks have −inf on purpose: from these only NaN and +inf count.
MASKING = ("aten::masked_fill", "aten::where", "aten::full", "aten::fill", "aten::scalar_tensor")


class Row(NamedTuple):
    """The stream x behind a part of the model: the largest |x| and |gradient| of the step."""

    part: str
    largest: float | None = None
    largest_gradient: float | None = None  # None: no gradient came there


class Findings(NamedTuple):
    first: str | None  # what isn't finite first, and where; None: all is finite
    rows: list[Row]  # in forward order
    bad_gradients: list[str]  # names of parameters


def trouble(x: Tensor) -> str | None:
    """ "NaN", "inf" or "-inf" where x has one, the first of these; None if it is finite."""
    if not x.is_floating_point() or not x.numel():
        return None
    if x.itemsize == 1:  # FP8 numbers can't be compared
        x = x.float()
    if torch.isfinite(x).all():
        return None
    if x.isnan().any():
        return "NaN"
    return "inf" if (x == math.inf).any() else "-inf"


def described(name: str, x: Tensor) -> str:
    """ "qk_bank (8, 64, 32) bfloat16"."""
    return f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def bad_tensors(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Each of these that isn't finite, with what it has; of a bank the first such matrix, or row.

    "qk_bank[3] (64, 32) bfloat16 has NaN"
    """
    found = []
    for name, x in named:
        what = None if x is None else trouble(x)
        if what is None:
            continue
        if x.dim() > 1:
            bad = (~torch.isfinite(x)).flatten(1).any(1)
            index = int(bad.nonzero()[0, 0])
            name, x = f"{name}[{index}]", x[index]
        found.append(f"{described(name, x)} has {what}")
    return found


def find(model: nn.Module, compute: Callable[[], Any]) -> Findings:
    """Run `compute`, a step's forward and backward pass of `model`, uncompiled, and watch it.

    Behind it the model's gradients are those of this step alone.
    """
    for param in model.parameters():
        param.grad = None
    watch = _Watch()
    with _parts_told_to(watch, model), watch:
        compute()
    parameters = bad_tensors(model.named_parameters())
    gradients = bad_tensors((name, param.grad) for name, param in model.named_parameters())
    first = f"parameter {parameters[0]}" if parameters else watch.first
    if first is None and gradients:
        first = watch.backward_suspect or f"gradient of {gradients[0]}"
    return Findings(first, list(watch.rows.values()), gradients)


class _Watch(TorchDispatchMode):
    """Sees what every operator gives, forward and backward.

    What isn't finite counts only if it is still there where a part of the model ends: `first`. In
    the backward pass that shows at its end only, in the parameters' gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.is_backward = "weights in FP8", False
        self.first: str | None = None
        self.suspect: str | None = None
        self.backward_suspect: str | None = None
        self.rows: dict[str, Row] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = self.backward_suspect if self.is_backward else self.suspect
        if self.first is None and known is None and _computes(func):
            self._look_at(func._schema.name, outputs)
        return outputs

    def _look_at(self, op: str, outputs: Any) -> None:
        for x in tree_leaves(outputs):
            what = trouble(x) if isinstance(x, Tensor) else None
            if what is None or (what == "-inf" and op.startswith(MASKING)):
                continue
            name = described(op.replace("::", "."), x)
            if self.is_backward:
                self.backward_suspect = f"{self.part}, backward: {name} has {what}"
            else:
                self.suspect = f"{self.part}: {name} has {what}, from {_source_line()}"
            return

    def begin(self) -> None:
        """A micro-batch goes through the model."""
        self.part, self.is_backward, self.suspect = "embedding", False, None

    def ended(self, x: Tensor, next_part: str | None) -> None:
        """The part gave x; None: it was the last one, and the backward pass comes."""
        largest = self._note("largest", x)
        if not math.isfinite(largest) and self.first is None:
            self.first = self.suspect or f"{self.part}: {described('its output', x)}"
        self.suspect = None
        if next_part is None:
            self.is_backward = True
        else:
            self.part = next_part

    def gradient_behind(self, part: str, gradients: Iterable[Tensor | None]) -> None:
        """The backward pass reaches this part."""
        self.part = part
        for gradient in gradients:
            if gradient is not None:
                self._note("largest_gradient", gradient)

    def _note(self, field: str, x: Tensor) -> float:
        """Into the part's row: the largest |x|, NaN above all."""
        largest = float(x.detach().abs().max()) if x.numel() else 0.0
        row = self.rows.get(self.part, Row(self.part))
        before = getattr(row, field)
        if before is None or math.isnan(largest) or largest > before:
            self.rows[self.part] = row._replace(**{field: largest})
        return largest


def _source_line() -> str:
    """ "layer.py:120": where the package calls the operator that runs."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE) and path != Path(__file__):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno}"
    return "elsewhere"


def _computes(func: Any) -> bool:
    """Not so: memory not yet written, and views, which may be of such."""
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and not func._schema.name.startswith(UNWRITTEN)


@contextlib.contextmanager
def _parts_told_to(watch: _Watch, model: nn.Module) -> Iterator[None]:
    """The model tells where it is, and none of it is compiled."""
    is_baseline = isinstance(model, BaselineGPT)
    num_layers = model.config.num_layers if is_baseline else len(model.layers)
    function = block_forward if is_baseline else layer_forward
    place = itertools.cycle(range(num_layers))

    def tell_gradient(part: str, *tensors: Tensor | None) -> None:
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        if wanted:
            register_multi_grad_hook(wanted, functools.partial(watch.gradient_behind, part))

    def layer(*inputs: Any) -> Any:
        i = next(place)
        if i == 0:
            x = inputs[1] if is_baseline else inputs[2]
            tell_gradient(watch.part, x)
            watch.ended(x, "layer 0")
        outputs = function(*inputs)
        x, *normed = (outputs,) if is_baseline else outputs
        tell_gradient(watch.part, x, *normed)
        watch.ended(x, f"layer {i + 1}" if i + 1 < num_layers else "head and loss")
        return outputs

    training_loss = type(model).training_loss.__get__(model)

    def told_loss(*inputs: Any) -> Tensor:
        watch.begin()
        loss = training_loss(*inputs)
        watch.ended(loss, None)
        return loss

    changed: dict[str, Any] = {
        "training_loss": told_loss,
        "trunk": type(model).trunk.__get__(model),
    }
    if is_baseline:
        changed |= {"block": layer, "summed_loss": summed_loss}
    else:
        changed["layer_functions"] = dict.fromkeys(model.layers, layer)
    before = {name: vars(model)[name] for name in changed if name in vars(model)}
    vars(model).update(changed)
    try:
        yield
    finally:
        for name in changed:
            del vars(model)[name]
        vars(model).update(before)
