"""NorMuon as a `torch.optim.Optimizer`, for any PyTorch loop; public as `speedrun.optim.NorMuon`.

The arithmetic is that of the training program (`update_rules.NorMuon`), in the same operators.
B matrices of M × N in a bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from speedrun.ops.normuon_step import normuon_step
from speedrun.ops.polar_express import momentum_polar_express
from speedrun.update_rules import PRECISIONS, polar_spec, shape_factor

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CHOICES = {
    "weight_rounding": ("truncate", "nearest"),
    "polar_form": ("standard", "gram"),
    "polar_precision": ("weight", *PRECISIONS),
    "polar_norm": ("frobenius", "s4"),
}


class NorMuon(Optimizer):
    """Muon with a variance per row or column: an update rule for matrices.

    For each matrix W (M, N) with gradient G, in fp32 (float64 of float64):

        m ← momentum·m + (1 − momentum)·G;   G' = (1 − momentum)·G + momentum·m
        O = PolarExpress(G'), which has G's singular vectors, and singular values of about 1
        v ← beta2·v + (1 − beta2)·mean(O²), by row where M ≥ N, else by column
        O ← O/√v, rescaled so that ‖O‖_F is what it was
        W ← W − η·O − η·lr·weight_decay·[O·W ≥ 0]·W,   η = lr·√max(1, M/N)

    params: matrices (M, N) or batches of them (B, M, N) in bfloat16, float32 or float64, or groups
    of these as for any optimizer. All other parameters go to another one, such as
    torch.optim.AdamW, and usually embeddings and the head too, matrices though they are. Those of
    one shape in a group are updated together.
    A parameter without gradient is left as it is. Gradients must be complete before `step` (DDP's
    are); a matrix that is cut into shards, as by FSDP, isn't one.

    The defaults are record_089's, and so is the decay, which goes by lr²: 1.2 at a rate of 0.023 is
    what 0.028 is to optimizers whose decay goes by lr. All but params may differ between groups,
    and change between steps:

    lr, momentum, beta2, weight_decay: as above.
    squared_decay False: the decay is −lr·weight_decay·W, as in torch.optim.AdamW and Muon.
    cautious False: W decays everywhere, not only where the step takes it towards 0 too.
    exact_weights: bfloat16 parameters have 16 more bits in the state, so that small updates are not
    lost; the parameter is the upper half of a float32, cut off, or rounded where weight_rounding is
    "nearest". A change that others make to the parameter leaves these bits as they are.
    polar_precision: the type of Polar Express's matrices, "bf16", "fp16" or the weight's own; in
    bf16 and fp16 there are kernels for it. polar_form "gram" computes over the short side;
    polar_norm "s4" takes a tighter bound of the largest singular value, and four steps for five.

    A step needs memory for a copy of the parameters of one group, their state, and O.

    TypeError, ValueError: parameters or numbers that can't be, at the start or in add_param_group;
    RuntimeError: a sparse gradient.
    Sources: Muon (kellerjordan.github.io/posts/muon), NorMuon (arXiv 2510.05491), Polar Express
    (arXiv 2505.16932); numbers and decay: the NanoGPT speedrun.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.023,
        *,
        momentum: float = 0.95,
        beta2: float = 0.9,
        weight_decay: float = 1.2,
        squared_decay: bool = True,
        cautious: bool = True,
        exact_weights: bool = True,
        weight_rounding: Literal["truncate", "nearest"] = "truncate",
        polar_form: Literal["standard", "gram"] = "standard",
        polar_precision: Literal["weight", "bf16", "fp16"] = "bf16",
        polar_norm: Literal["frobenius", "s4"] = "frobenius",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "squared_decay": squared_decay,
            "cautious": cautious,
            "exact_weights": exact_weights,
            "weight_rounding": weight_rounding,
            "polar_form": polar_form,
            "polar_precision": polar_precision,
            "polar_norm": polar_norm,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; errors as of the class, and the group isn't added then."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient. Gives what `closure`, called first, gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_device: dict[torch.device, dict[tuple, list[Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None or param.numel() == 0:
                    continue
                if not self.state[param]:
                    self.state[param] = _new_state(param, group)
                kind = (param.shape[-2:], param.dtype, "low" in self.state[param])
                by_device.setdefault(param.device, {}).setdefault(kind, []).append(param)
            for banks in by_device.values():
                self._update(group, list(banks.values()))
        return loss

    def _update(self, group: dict[str, Any], banks: Sequence[Sequence[Tensor]]) -> None:
        """Banks of one device, each the parameters of one shape and type."""
        states = [_bank_state([self.state[param] for param in params]) for params in banks]
        directions = momentum_polar_express(
            [_bank([_dense_gradient(param) for param in params]) for params in banks],
            [state["momentum"] for state in states],
            group["momentum"],
            PRECISIONS.get(group["polar_precision"]),
            polar_spec(group["polar_form"], group["polar_norm"]),
        )
        lr = float(group["lr"])
        for params, state, o_BMN in zip(banks, states, directions, strict=True):
            weight_BMN = _bank([param.detach() for param in params])
            wide = state["momentum"].dtype
            # Multiplied in the state's type, as the training program does it: to the same bits.
            step_lr = (torch.tensor(shape_factor(weight_BMN), dtype=wide) * lr).item()
            lr_B = torch.full((len(weight_BMN),), step_lr, dtype=torch.float64, device=o_BMN.device)
            normuon_step(
                weight_BMN,
                state.get("low"),
                o_BMN,
                state["second"],
                lr_B,
                group["weight_decay"] * (lr if group["squared_decay"] else 1.0),
                beta2=group["beta2"],
                decay_lr_B=None if group["squared_decay"] else torch.full_like(lr_B, lr),
                cautious=group["cautious"],
                nearest=group["weight_rounding"] == "nearest",
            )
            _write_back(weight_BMN, [param.detach() for param in params])
            for name, bank in state.items():
                _write_back(bank, [self.state[param][name] for param in params])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; in the state's own types, which differ from the parameter's.

        ValueError, with nothing changed: the state of another optimizer, or of other shapes.
        """
        saved_ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        saved = {
            param: state_dict["state"][key]
            for param, key in zip(params, saved_ids, strict=False)  # the base class compares them
            if key in state_dict["state"]
        }
        for param, state in saved.items():
            _check_saved_state(param, state)
        super().load_state_dict(state_dict)
        # The base class has cast all of it to the parameter's type: too few bits for bf16.
        for group in self.param_groups:
            for param in group["params"]:
                if param in saved:
                    self.state[param] = _new_state(param, group)
                    for name, tensor in self.state[param].items():
                        if name in saved[param]:
                            tensor.copy_(saved[param][name])


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if (isinstance(lr, Tensor) and lr.numel() != 1) or not 0 <= lr < math.inf:
        raise ValueError(f"NorMuon: lr must be a number >= 0, got {lr}")
    for name in ("momentum", "beta2"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"NorMuon: {name} must be in [0, 1), got {group[name]}")
    if not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"NorMuon: weight_decay must be >= 0, got {group['weight_decay']}")
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            choices = ", ".join(repr(value) for value in allowed)
            raise ValueError(f"NorMuon: {name} must be one of {choices}, got {group[name]!r}")
    names = group.get("param_names", [""] * len(group["params"]))
    for name, param in zip(names, group["params"], strict=True):
        what = f"parameter {name!r}" if name else "a parameter"
        if param.dim() < 2:
            raise ValueError(
                f"NorMuon: {what} has shape {tuple(param.shape)}; it takes matrices (M, N) or "
                "batches of them (B, M, N): give this one to torch.optim.AdamW"
            )
        if param.dim() > 3:
            raise ValueError(
                f"NorMuon: {what} has shape {tuple(param.shape)}; it takes matrices (M, N) or "
                "batches of them (B, M, N): make it one and view it where it is used, or give it "
                "to torch.optim.AdamW"
            )
        if param.dtype not in DTYPES:
            raise TypeError(
                f"NorMuon: {what} of shape {tuple(param.shape)} has type {param.dtype}; it takes "
                "bfloat16, float32 and float64"
            )


def _dense_gradient(param: Tensor) -> Tensor:
    assert param.grad is not None  # `step` leaves the others out
    if param.grad.is_sparse:
        raise RuntimeError(
            f"NorMuon: the gradient of a parameter of shape {tuple(param.shape)} is sparse; it "
            "takes dense ones (nn.Embedding: sparse=False)"
        )
    return param.grad


def _check_saved_state(param: Tensor, saved: dict[str, Any]) -> None:
    wanted = {"momentum": param.shape, "second": _second_shape(param)}
    found = {name: t.shape for name, t in saved.items() if isinstance(t, Tensor)}
    if any(found.get(name) != shape for name, shape in wanted.items()):
        shapes = {name: tuple(shape) for name, shape in found.items()}
        raise ValueError(
            f"NorMuon: a parameter of shape {tuple(param.shape)} needs the state "
            f"{ {name: tuple(shape) for name, shape in wanted.items()} }, the state_dict has "
            f"{shapes}: it belongs to another optimizer or to another model"
        )


def _second_shape(param: Tensor) -> torch.Size:
    """(…, M, 1), or (…, 1, N) where M < N."""
    *batch, m, n = param.shape
    return torch.Size((*batch, m, 1) if m >= n else (*batch, 1, n))


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Zeros: momentum like the parameter and second in at least fp32, low in int16."""
    wide = torch.promote_types(param.dtype, torch.float32)
    shapes = {"momentum": (param.shape, wide), "second": (_second_shape(param), wide)}
    if param.dtype == torch.bfloat16 and group["exact_weights"]:
        shapes["low"] = (param.shape, torch.int16)
    return {
        name: torch.zeros(shape, dtype=dtype, device=param.device)
        for name, (shape, dtype) in shapes.items()
    }


def _bank_state(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _bank([state[name] for state in states]) for name in states[0]}


def _bank(tensors: Sequence[Tensor]) -> Tensor:
    """(B, M, N), contiguous, of (M, N) and (b, M, N): a copy, or of a single one a view."""
    parts = [_as_3d(t) for t in tensors]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _write_back(bank: Tensor, tensors: Sequence[Tensor]) -> None:
    """What was `_bank(tensors)`, into them."""
    if bank.data_ptr() == tensors[0].data_ptr():  # a view
        return
    parts = [_as_3d(t) for t in tensors]
    torch._foreach_copy_(parts, bank.split([len(part) for part in parts]))


def _as_3d(t: Tensor) -> Tensor:
    return t if t.dim() == 3 else t[None]
