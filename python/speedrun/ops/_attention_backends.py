"""Who can compute `attention`: one way to call FlashAttention in its versions, ours, and torch's.

Each is imported when it is first tried; ops/_attention_choice.py says which of them serves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.ops import _dispatch

DTYPE = torch.bfloat16
ON_CPUS = ("triton", "sdpa")  # where these can run too
FLEX_BLOCK = 128  # sides of a block of flex_attention's mask
STRIP = "attention_strip"  # a second form of our backward pass,
STRIP_WINDOW = 384  # and the longest window for it: docs/kernels/attention_strip.md counts why


class NotInstalled(Exception):
    """There is no such package here: nothing to warn of."""


class Batch(NamedTuple):
    """Who sees whom, and what the backend's `prepare` made of it."""

    cu_seqlens: Tensor  # (N,) int32
    window: int
    max_seqlen: int  # no document is longer
    extra: Tensor


class Backend(NamedTuple):
    """q, k (T, H, K), v, out and dout (T, H, E), lse (H, T) float32, of base 2 or e as it likes."""

    forward: Callable[[Tensor, Tensor, Tensor, Batch, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]  # (dout, q, k, v, out, lse, batch, scale)
    prepare: Callable[[Tensor, int, int], Tensor] = lambda cu_seqlens, num_tokens, window: (
        cu_seqlens.new_empty(0)
    )  # (cu_seqlens, num_tokens, window) -> extra, once a batch


# ---- FlashAttention --------------------------------------------------------------------------


def _module(name: str) -> ModuleType:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent
        found = None
    if found is None:
        raise NotInstalled(name)
    return importlib.import_module(name)


def _call(function: Callable, arguments: dict) -> tuple | Tensor:
    """`function` with those of the arguments that it has. Versions name them differently, so there
    are several spellings of some; whether the right ones arrived is seen in the trial."""
    names = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return function(**{name: value for name, value in arguments.items() if name in names})


def _lengths(batch: Batch, scale: float) -> dict:
    return {
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_k": batch.cu_seqlens,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_k": batch.max_seqlen,
        "softmax_scale": scale,
        "causal": True,
        "is_causal": True,
        "window_size": (batch.window, 0),
        "window_size_left": batch.window,
        "window_size_right": 0,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
        "return_lse": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _flash(forward_function: Callable, backward_function: Callable) -> Backend:
    """A FlashAttention by its functions below autograd."""

    def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float):
        out, lse, *_ = _call(forward_function, {"q": q, "k": k, "v": v, **_lengths(batch, scale)})
        return out, lse

    def backward(dout, q, k, v, out, lse, batch: Batch, scale: float):
        grads = {f"d{name}": torch.empty_like(t) for name, t in zip("qkv", (q, k, v), strict=True)}
        tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        tensors |= {"softmax_lse": lse, "lse": lse}
        found = _call(backward_function, {**tensors, **grads, **_lengths(batch, scale)})
        return tuple(found[:3]) if isinstance(found, tuple) else tuple(grads.values())

    return _same_width(Backend(forward, backward))


def _same_width(backend: Backend) -> Backend:
    """For kernels that need as many columns of q and k as of v: zeros are added, and cut off."""

    def padded(K: int, E: int, *tensors: Tensor) -> list[Tensor]:
        return [F.pad(t, (0, max(K, E) - t.shape[-1])) if K != E else t for t in tensors]

    def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float):
        K, E = q.shape[-1], v.shape[-1]
        q, k, v = padded(K, E, q, k, v)
        out, lse = backend.forward(q, k, v, batch, scale)
        return out[..., :E], lse

    def backward(dout, q, k, v, out, lse, batch: Batch, scale: float):
        K, E = q.shape[-1], v.shape[-1]
        dout, q, k, v, out = padded(K, E, dout, q, k, v, out)
        dq, dk, dv = backend.backward(dout, q, k, v, out, lse, batch, scale)
        return dq[..., :K], dk[..., :K], dv[..., :E]

    return Backend(forward, backward)


def _fa3() -> Backend:
    try:
        module = _module("flash_attn_interface")
    except NotInstalled as neither:
        if importlib.util.find_spec("kernels") is None:
            raise NotInstalled(f"{neither} (or kernels)") from None
        hub = _module("kernels")
        module = hub.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface
    return _flash(module._flash_attn_forward, module._flash_attn_backward)


def _fa4() -> Backend:
    module = _module("flash_attn.cute.interface")
    return _flash(module._flash_attn_fwd, module._flash_attn_bwd)


def _fa2() -> Backend:
    try:
        module = _module("flash_attn.flash_attn_interface")
    except NotInstalled:
        return _same_width(Backend(_torch_fa2_forward, _torch_fa2_backward))
    return _flash(module._flash_attn_varlen_forward, module._flash_attn_varlen_backward)


def _torch_fa2_forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float):
    lengths = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    window = {"window_size_left": batch.window, "window_size_right": 0}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, True, False, scale=scale, **window
    )
    return out, lse


def _torch_fa2_backward(dout, q, k, v, out, lse, batch: Batch, scale: float):
    lengths = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    window = {"window_size_left": batch.window, "window_size_right": 0}
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *lengths, 0.0, True, *no_dropout, scale=scale, **window
    )


# ---- Ours, and torch's -----------------------------------------------------------------------


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise NotInstalled("triton")
    from speedrun.triton_kernels import attention as kernels
    from speedrun.triton_kernels import attention_strip as strip

    def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float):
        return kernels.attention_forward(q, k, v, batch.extra, batch.window, scale)

    def backward(dout, q, k, v, out, lse, batch: Batch, scale: float):
        form = strip if batch.window <= STRIP_WINDOW and strip_serves(q.device) else kernels
        return form.attention_backward(dout, q, k, v, out, lse, batch.extra, batch.window, scale)

    return Backend(forward, backward, kernels.tile_list)


def strip_serves(device: torch.device) -> bool:
    """Whether our backward pass takes its strip form where it can: by a verdict of its own, or an
    override that names it; "torch" there is the plain form, and one for all operators is not it."""
    named = _dispatch.named_override(STRIP)
    if named is None and _dispatch.forced_backend(STRIP) is not None:
        return False
    serves = _dispatch.decide(STRIP, device, triton=True) == "triton"
    if serves:
        _dispatch.note(STRIP, "triton")
    return serves


def _by_autograd(function: Callable, prepare: Callable) -> Backend:
    """Of a differentiable function of (q, k, v, batch, scale), which the gradient runs again."""

    def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float):
        with torch.no_grad():
            out = function(q, k, v, batch, scale)
        return out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)

    def backward(dout, q, k, v, out, lse, batch: Batch, scale: float):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(function(*leaves, batch, scale), leaves, dout)

    return Backend(forward, backward, prepare)


def _documents(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens, tokens, out_int32=True, right=True)


def _seen(cu_seqlens: Tensor, window: int, query: Tensor, key: Tensor) -> Tensor:
    """Whether tokens `query` see tokens `key`, bool; broadcast."""
    same = _documents(cu_seqlens, query) == _documents(cu_seqlens, key)
    return (query >= key) & (query - key <= window) & same


def _sdpa() -> Backend:
    def prepare(cu_seqlens: Tensor, num_tokens: int, window: int) -> Tensor:
        token = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
        return _seen(cu_seqlens, window, token[:, None], token[None, :])

    def function(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.extra, scale=scale)
        return y[0].transpose(0, 1)

    return _by_autograd(function, prepare)


def flex_blocks(cu_seqlens: Tensor, num_tokens: int, window: int) -> Tensor:
    """(2, B, B + 1) int32 for B blocks of queries: how many blocks of keys they see in part, and in
    full, and which ones (the numbers first, then others). Made from 3·B² numbers on the device."""
    block = torch.arange(0, num_tokens, FLEX_BLOCK, dtype=torch.int32, device=cu_seqlens.device)
    query, key, last = block[:, None], block[None, :], FLEX_BLOCK - 1
    # Documents and windows are intervals: what holds for the nearest pair holds for some pair, and
    # what holds for the farthest holds for all.
    some = (query == key) | _seen(cu_seqlens, window, query, key + last)
    full = (query > key) & _seen(cu_seqlens, window, query + last, key)
    full &= query + last < num_tokens
    kinds = torch.stack([some & ~full, full]).int()
    indices = kinds.argsort(dim=-1, descending=True, stable=True).int()
    return torch.cat([kinds.sum(-1, keepdim=True, dtype=torch.int32), indices], dim=-1).contiguous()


def _flex() -> Backend:
    module = _module("torch.nn.attention.flex_attention")
    compiled = torch.compile(module.flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        token = torch.arange(len(q), dtype=torch.int32, device=q.device)
        document = _documents(batch.cu_seqlens, token)
        window = torch.full((), batch.window, dtype=torch.int32, device=q.device)

        def mask_mod(b, h, query, key):
            near = (query >= key) & (query - key <= window)
            return near & (document[query] == document[key])

        counts, indices = batch.extra[:, None, None, :, 0], batch.extra[:, None, None, :, 1:]
        counts, indices = counts.contiguous(), indices.contiguous()
        mask = module.BlockMask.from_kv_blocks(
            counts[0], indices[0], counts[1], indices[1], FLEX_BLOCK, mask_mod, (len(q), len(q))
        )
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, scale=scale)[0].transpose(0, 1)

    return _by_autograd(function, flex_blocks)


LOADERS: dict[str, Callable[[], Backend]] = {
    "fa3": _fa3,
    "fa4": _fa4,
    "triton": _triton,
    "fa2": _fa2,
    "flex": _flex,
    "sdpa": _sdpa,
}


@functools.cache
def load(name: str) -> Backend:
    return LOADERS[name]()
