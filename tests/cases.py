"""Shapes that operators are tested and measured at, each with its reason; for benchmarks/ too."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one operator; `why` says what it is there for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    why: str
    add: bool = False


def _small(name: str, shape: tuple[int, ...], why: str) -> Case:
    return Case(name, shape, torch.float32, why)


# For every type, on every backend.
TRANSPOSE_SMALL = (
    _small("one_tile", (64, 64), "a tile of 2- and 4-byte types, aligned"),
    _small("byte_tile", (128, 128), "a tile of 1-byte types; four of the others"),
    _small("edges", (48, 272), "aligned, and tiles are cut on both sides"),
    _small("odd", (33, 65), "no row is aligned"),
    _small("odd_rows", (65, 128), "only the input's rows are aligned"),
    _small("odd_cols", (128, 65), "only the output's rows are aligned"),
    _small("one_row", (1, 130), "nothing to swap but the shape"),
    _small("one_col", (130, 1), "the same from the other side"),
    _small("one", (1, 1), "the smallest"),
    _small("batch", (3, 40, 24), "batches, with a stride that is no power of two"),
    _small("batch_of_one", (1, 65, 16), "a batch that only adds a dimension"),
    _small("empty", (0, 5), "no rows"),
    _small("empty_cols", (5, 0), "no columns"),
    _small("empty_batch", (0, 4, 4), "no matrices"),
)

# What training does (RECIPE: width 768, MLP 3072, vocabulary padded to 50304), for a GPU.
TRANSPOSE_FULL = (
    Case("tied_head", (768, 50304), torch.bfloat16, "the head's copy for the embedding, each step"),
    Case(
        "tied_grad", (50304, 768), torch.bfloat16, "the embedding's gradient into the head's", True
    ),
    Case("logit_grad", (16384, 50304), torch.float8_e5m2, "second layout of the logits' gradient"),
    Case(
        "mlp_post", (49152, 3072), torch.float8_e4m3fn, "the MLP's activations for its dW, stage 3"
    ),
    Case("mlp_bank", (24, 768, 3072), torch.bfloat16, "a bank of MLP matrices, tall to wide"),
    Case("fp32", (768, 50304), torch.float32, "moments that follow the head when it is untied"),
    Case("odd", (50257, 769), torch.bfloat16, "the path for sides that are not aligned"),
)
