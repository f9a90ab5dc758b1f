"""Sliding windows in blocks: each block of w queries against its own and the block before's keys.

T tokens, H heads, K head dim of queries and keys, E head dim of values, B blocks of w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Additive mask of each block of w queries against its own and the previous block's keys."""

    bias_B1wx: Tensor  # (B, 1, w, 2w) float: 0 where the query sees the key, else -inf
    num_tokens: int

    @property
    def block(self) -> int:
        return self.bias_B1wx.shape[2]


def block_mask(cu_seqlens: Tensor, num_tokens: int, window: int, dtype: torch.dtype) -> BlockMask:
    """The mask of a batch: `cu_seqlens` (N,) int32 rising document starts, padded with T."""
    block = max(1, min(window, num_tokens))
    num_blocks = -(-num_tokens // block)
    pos = torch.arange(-block, num_blocks * block, device=cu_seqlens.device)
    doc = torch.searchsorted(cu_seqlens, pos.to(cu_seqlens.dtype), right=True)
    # Padding tokens are documents of their own, with negative numbers, each different: no real
    # token sees them, and no row of the softmax is empty.
    doc = torch.where(pos < 0, pos, torch.where(pos >= num_tokens, -1 - pos, doc))
    key_pos = pos.unfold(0, 2 * block, block)[:, None, :]
    key_doc = doc.unfold(0, 2 * block, block)[:, None, :]
    query_pos, query_doc = key_pos.mT[:, block:], key_doc.mT[:, block:]
    distance = query_pos - key_pos
    seen = (distance >= 0) & (distance <= window) & (query_doc == key_doc)
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return BlockMask(bias[:, None], num_tokens)


def in_blocks(
    q_THK: Tensor, k_THK: Tensor, v_THE: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, w, K), keys (B, H, 2w, K) and values (B, H, 2w, E) of each block."""
    block, num_blocks = mask.block, mask.bias_B1wx.shape[0]
    tail = -mask.num_tokens % block

    def keys(x_THK: Tensor) -> Tensor:
        padded = F.pad(x_THK, (0, 0, 0, 0, block, tail))
        return padded.unfold(0, 2 * block, block).permute(0, 1, 3, 2)

    q = F.pad(q_THK, (0, 0, 0, 0, 0, tail)).unflatten(0, (num_blocks, block)).transpose(1, 2)
    return q, keys(k_THK), keys(v_THE)
