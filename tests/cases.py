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


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """A (m, k) times B (n, k) transposed; `kind` names the front door or what training does."""

    name: str
    m: int
    n: int
    k: int
    why: str
    kind: str = "store"
    a_dtype: torch.dtype = torch.float8_e4m3fn
    b_dtype: torch.dtype = torch.float8_e4m3fn
    fast_accum: bool = False


# For every type, on every backend.
FP8_MATMUL_SMALL = (
    MatmulCase("one_tile", 128, 128, 128, "a whole tile, one step along K"),
    MatmulCase("edges", 80, 144, 208, "aligned to 16, and tiles are cut on all sides"),
    MatmulCase("wide_tile", 160, 272, 144, "the large tile of fast sums, cut"),
    MatmulCase("unaligned", 33, 65, 17, "no row starts at a multiple of 16 bytes: no TMA"),
    MatmulCase("many_tiles", 1168, 144, 16, "more than one group of row tiles, the last one short"),
    MatmulCase("one_row", 1, 48, 64, "a vector times a matrix"),
    MatmulCase("one_column", 48, 1, 64, "a matrix times a vector"),
    MatmulCase("one", 1, 1, 1, "the smallest"),
    MatmulCase("long_k", 32, 32, 4112, "many steps along K, the last one short; K is cut in parts"),
    MatmulCase("no_rows", 0, 16, 32, "nothing to do"),
    MatmulCase("no_columns", 16, 0, 32, "nothing to do, from the other side"),
    MatmulCase("no_k", 5, 7, 0, "sums of nothing: zeros"),
)


def _training_matmuls(stage: str, tokens: int) -> tuple[MatmulCase, ...]:
    """The FP8 products of one stage: width 768, MLP 3072, vocabulary 50304 (KERNELS 0.2)."""
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    rows = (
        ("up", tokens, 3072, 768, "MLP up, and relu² behind it", "relu2", e4m3, e4m3, True),
        ("down", tokens, 768, 3072, "MLP down", "store", e4m3, e4m3, True),
        ("dpre", tokens, 3072, 768, "back through down and relu²", "drelu2", e5m2, e4m3, False),
        ("dx", tokens, 768, 3072, "back through up", "store", e5m2, e4m3, False),
        ("dw_up", 3072, 768, tokens, "few tiles and a long K", "add", e5m2, e4m3, False),
        ("dw_down", 3072, 768, tokens, "the same, types swapped", "add", e4m3, e5m2, False),
        ("head", tokens, 50304, 768, "logits", "store", e4m3, e4m3, True),
        ("head_dx", tokens, 768, 50304, "longest K", "store", e5m2, e4m3, False),
        ("head_dw", 768, 50304, tokens, "many tiles and a long K", "add", e4m3, e5m2, False),
    )
    return tuple(MatmulCase(f"{row[0]}_{stage}", *row[1:]) for row in rows)


FP8_MATMUL_FULL = tuple(
    case
    for stage, tokens in (("s1", 16384), ("s2", 32768), ("s3", 49152))
    for case in _training_matmuls(stage, tokens)
) + tuple(  # of attention's projections in FP8, at the last stage's tokens
    MatmulCase(name, 49152, n, k, why, a_dtype=a_dtype, fast_accum=a_dtype == torch.float8_e4m3fn)
    for name, n, k, why, a_dtype in (
        ("qkv_s3", 2304, 768, "Q, K and V", torch.float8_e4m3fn),
        ("qkv_dx_s3", 768, 2304, "back through them", torch.float8_e5m2),
        ("out_s3", 768, 768, "attention's output: the least work a byte", torch.float8_e4m3fn),
        ("out_dx_s3", 768, 768, "back through it", torch.float8_e5m2),
    )
)


# For every type, on every backend.
FP8_QUANTIZE_SMALL = (
    _small("one_tile", (128, 128), "a tile, aligned"),
    _small("edges", (160, 272), "aligned, and tiles are cut on both sides"),
    _small("norm_steps", (48, 528), "a norm takes its rows in several steps, the last one short"),
    _small("out_unaligned", (16, 40), "rows of 2- and 4-byte types are aligned, of fp8 not"),
    _small("odd", (33, 65), "no row is aligned"),
    _small("one_row", (1, 130), "a vector"),
    _small("one_col", (130, 1), "the same from the other side"),
    _small("one", (1, 1), "the smallest"),
    _small("batch", (3, 40, 24), "batches, with a stride that is no power of two"),
    _small("empty", (0, 5), "no rows"),
    _small("empty_cols", (5, 0), "no columns"),
    _small("empty_batch", (0, 4, 4), "no matrices"),
)

# What training casts (RECIPE section 3): width 768, MLP 3072, 16,384 to 49,152 tokens.
FP8_QUANTIZE_FULL = (
    *(
        Case(f"{kind}_{stage}", (tokens, width), torch.bfloat16, why)
        for stage, tokens in (("s1", 16384), ("s2", 32768), ("s3", 49152))
        for kind, width, why in (
            ("x", 768, "input of the MLP and of the head"),
            ("norm", 768, "the same, from the residual stream: RMS norm and cast in one"),
            ("post", 3072, "the MLP's activations, both layouts"),
        )
    ),
    Case("head", (768, 50304), torch.bfloat16, "the head's weight, both layouts"),
    Case("refresh", (24, 3072, 768), torch.bfloat16, "all MLP weights after an optimizer step"),
)


@dataclasses.dataclass(frozen=True)
class MlpCase:
    """T tokens through an MLP of D and F; with the gradients or without."""

    name: str
    tokens: int
    dim: int
    hidden: int
    why: str


RELU2_MLP_SMALL = (
    MlpCase("one_tile", 128, 64, 128, "a tile, aligned"),
    MlpCase("edges", 80, 48, 160, "aligned, and tiles are cut on all sides"),
)
RELU2_MLP_FULL = (
    MlpCase("s1", 16384, 768, 3072, "a part of a step in stage 1"),
    MlpCase("s2", 32768, 768, 3072, "in stage 2"),
    MlpCase("s3", 49152, 768, 3072, "in stage 3"),
)


@dataclasses.dataclass(frozen=True)
class AdamCase:
    """Parameters that one call updates, by shape and type; `unseen_frac` of their rows, or None
    for a call without `seen`, have never had a gradient."""

    name: str
    params: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    why: str
    moments: torch.dtype = torch.float32
    unseen_frac: float | None = None


# Shapes for every type, on every backend.
ADAM_STEP_SMALL = (
    ((64, 96), "whole blocks and vectors"),
    ((33, 65), "rows that start anywhere, and a last vector that is cut"),
    ((5, 3, 8), "more than two dimensions"),
    ((4, 4112), "rows longer than a block"),
    ((1, 1), "the smallest row"),
    ((), "a scalar"),
    ((0, 8), "no rows"),
    ((3, 0), "no columns"),
)

# What training updates (RECIPE section 4): tables whole, and the share of one of 8 GPUs.
_TABLES = (("embed", 50304), ("value_embeds", 5 * 50304), ("bigram_embed", 377280))
_SMALL_PARAMS = (  # scalars, gates, the two gate nets and the two of MUDD
    *(((11,), torch.float32) for _ in ("λ_qkv", "λ_o", "p_attn", "p_mlp", "r_attn", "r_mlp")),
    *(((), torch.float32) for _ in ("λ_smear", "λ_skip", "gate_s")),
    *((shape, torch.bfloat16) for shape in ((12,), (4, 6, 12))),
    *(
        (shape, torch.bfloat16)
        for outputs in (26, 41, 14, 5)
        for shape in ((64, 768), (outputs, 64), (outputs,))
    ),
)
ADAM_STEP_FULL = (
    *(
        AdamCase(name + part, (((rows // share, 768), torch.bfloat16),), why)
        for name, rows in _TABLES
        for share, part, why in ((1, "", "a table on one GPU"), (8, "_8", "its share on 8"))
    ),
    AdamCase("small", _SMALL_PARAMS, "all small parameters in one call: launches count"),
    AdamCase(
        "bf16_moments_8",
        (((377280 // 8, 768), torch.bfloat16),),
        "moments of half the bytes",
        moments=torch.bfloat16,
    ),
    AdamCase(
        "half_seen_8",
        (((377280 // 8, 768), torch.bfloat16),),
        "rows that need only the read of their gradient, between others",
        unseen_frac=0.5,
    ),
)


@dataclasses.dataclass(frozen=True)
class SymCase:
    """alpha·A·Aᵀ + beta·C of A (batch, n, k); trans: alpha·Aᵀ·A of A (batch, k, n); b: another
    operand instead of A, with which the product is symmetric too."""

    name: str
    batch: int
    n: int
    k: int
    why: str
    trans: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    b: bool = False


# For every type, on every backend.
SYM_MATMUL_SMALL = (
    SymCase("one_tile", 1, 64, 64, "a whole tile, on the diagonal"),
    SymCase("edges", 2, 144, 80, "aligned, and tiles are cut on both sides"),
    SymCase("edges_trans", 2, 144, 80, "the same from the other side", trans=True),
    SymCase("odd", 3, 65, 33, "no row is aligned"),
    SymCase("odd_trans", 3, 65, 33, "the same from the other side", trans=True),
    SymCase("add", 2, 130, 96, "alpha, beta and C", alpha=-0.5, beta=3.0),
    SymCase("add_trans", 2, 130, 96, "the same from the other side", True, -0.5, 3.0),
    SymCase("add_nothing", 1, 48, 16, "C alone is left", alpha=0.0, beta=2.0),
    SymCase("commuting", 2, 80, 80, "two operands", alpha=1.5, beta=0.5, b=True),
    SymCase("many_tiles", 17, 272, 24, "so many that programs take large tiles"),
    SymCase("many_tiles_trans", 17, 272, 24, "the same from the other side", trans=True),
    SymCase("one_row", 2, 1, 70, "a square of a norm"),
    SymCase("one_column", 2, 40, 1, "an outer product"),
    SymCase("one", 1, 1, 1, "the smallest"),
    SymCase("no_k", 2, 5, 0, "sums of nothing: beta·C", beta=2.0),
    SymCase("no_rows", 2, 0, 5, "nothing to do"),
    SymCase("no_matrices", 0, 5, 5, "nothing to do"),
)


def _polar_express_products(share: str, batches: tuple[int, int, int]) -> tuple[SymCase, ...]:
    """Those of the three banks (RECIPE section 4): grams, and polynomials of them."""
    qk, vo, mlp = batches
    return (
        SymCase(f"qk_gram{share}", qk, 256, 768, "wide matrices: XXᵀ"),
        SymCase(f"vo_gram{share}", vo, 768, 768, "square ones"),
        SymCase(f"mlp_gram{share}", mlp, 768, 3072, "tall ones: XᵀX", trans=True),
        SymCase(f"qk_poly{share}", qk, 256, 256, "b·A + c·A²", alpha=0.5, beta=-2.8),
        SymCase(f"vo_mlp_poly{share}", vo + mlp, 768, 768, "of both banks", False, 0.5, -2.8),
    )


SYM_MATMUL_FULL = (
    *_polar_express_products("", (64, 24, 24)),
    *_polar_express_products("_8", (8, 3, 3)),
)


# For every type, on every backend: banks (B, M, N).
NORMUON_STEP_SMALL = (
    ((2, 64, 128), "a wide matrix of one tile"),
    ((1, 144, 128), "tall, and a cut tile"),
    ((2, 48, 272), "wide, and the same"),
    ((3, 33, 25), "tall, and no row is aligned"),
    ((3, 25, 33), "wide, and the same"),
    ((2, 1, 70), "one row, whose columns are the lines"),
    ((2, 70, 1), "one column"),
    ((1, 1, 1), "the smallest"),
    ((0, 4, 4), "no matrices"),
    ((2, 0, 5), "no rows"),
    ((2, 5, 0), "no columns"),
)


@dataclasses.dataclass(frozen=True)
class NormuonCase:
    """A bank (B, M, N) of bf16 weights with low bits and O in bf16."""

    name: str
    shape: tuple[int, int, int]
    why: str
    second: bool = True
    fp8: bool = False


# The record's banks (RECIPE section 3), whole and the share of one of 8 GPUs.
NORMUON_STEP_FULL = (
    NormuonCase("qk", (64, 256, 768), "wide matrices"),
    NormuonCase("vo", (24, 768, 768), "square ones"),
    NormuonCase("mlp", (24, 3072, 768), "tall ones"),
    NormuonCase("qk_8", (8, 256, 768), "8 matrices a GPU"),
    NormuonCase("vo_8", (3, 768, 768), "3 matrices a GPU: the fewest blocks"),
    NormuonCase("mlp_8", (3, 3072, 768), "3 matrices a GPU"),
    NormuonCase("mlp_fp8", (24, 3072, 768), "with both fp8 copies for the next forward", fp8=True),
    NormuonCase("mlp_muon", (24, 3072, 768), "without the variance: one launch", second=False),
)


@dataclasses.dataclass(frozen=True)
class PolarCase:
    """Banks (B, M, N) that are orthogonalised in one call."""

    name: str
    banks: tuple[tuple[int, int, int], ...]
    why: str


POLAR_EXPRESS_SMALL = (
    PolarCase("small", ((2, 64, 192), (1, 96, 96), (2, 200, 64)), "wide, square and tall together"),
)
# The three banks of training (RECIPE section 4), whole and one GPU's share of 8.
POLAR_EXPRESS_FULL = tuple(
    PolarCase(f"{name}{part}", tuple((b // share, m, n) for b, m, n in banks), why)
    for share, part in ((1, ""), (8, "_8"))
    for name, banks, why in (
        ("qk", ((64, 256, 768),), "small products: launches and idle SMs count"),
        ("vo", ((24, 768, 768),), "square"),
        ("mlp", ((24, 3072, 768),), "tall"),
        ("all", ((64, 256, 768), (24, 768, 768), (24, 3072, 768)), "a step; n = 768 is shared"),
    )
)


@dataclasses.dataclass(frozen=True)
class MixCase:
    """Streams of `tokens` rows that are mixed; the first one's width is the sum's."""

    name: str
    tokens: int
    widths: tuple[int, ...]
    why: str


RESIDUAL_MIX_SMALL = (
    MixCase("aligned", 40, (128, 128, 128), "rows of whole vectors, several programs"),
    MixCase("narrow", 33, (96, 96, 96, 24, 96), "a bigram embedding of fewer columns between"),
    MixCase("odd", 7, (65, 65, 33), "no row is aligned"),
    MixCase("many_terms", 3, (32,) * 8, "more than the model has"),
    MixCase("wide_rows", 3, (5000, 5000, 1), "a row a program"),
    MixCase("two_columns", 64, (2, 1), "a norm of two numbers, a column"),
    MixCase("one_row", 1, (96, 96, 48), "one token"),
    MixCase("empty", 0, (96, 96), "no tokens"),
)

# What a layer of the record does (RECIPE section 3), at the three stages' tokens.
STAGES = (("s1", 16384), ("s2", 32768), ("s3", 49152))
RESIDUAL_MIX_FULL = tuple(
    MixCase(f"{kind}_{stage}", tokens, (768,) * num_terms, why)
    for stage, tokens in STAGES
    for kind, num_terms, why in (
        ("attention", 4, "behind attention: x, its output, x0, bigram embedding; and the norm"),
        ("mlp", 2, "behind the MLP: x, its output; and the next layer's norm"),
        ("mudd", 6, "behind the last layer: six streams; and the head's norm"),
    )
)


@dataclasses.dataclass(frozen=True)
class HeadsCase:
    """Attention of P parts of T tokens, heads of width K (queries, keys) and E (values).

    offset: partial key offset; first: some tokens begin documents; paired: heads turn by positions
    of their own; ve, gate: a value embedding, and its gate."""

    name: str
    parts: int
    tokens: int
    heads: int
    head_dim: int
    value_dim: int
    why: str
    offset: bool = False
    first: bool = False
    paired: bool = False
    ve: bool = False
    gate: bool = False


QK_NORM_ROPE_SMALL = (
    HeadsCase("whole_block", 1, 16, 2, 128, 128, "rows are whole programs"),
    HeadsCase("cut", 2, 11, 3, 64, 64, "the last program is cut, and parts end within one"),
    HeadsCase("narrow", 1, 13, 6, 96, 128, "widths that differ, one no power of two"),
    HeadsCase("gated", 2, 7, 3, 128, 128, "value embedding with a gate", ve=True, gate=True),
    HeadsCase("added", 2, 7, 3, 128, 64, "value embedding as it is", ve=True),
    HeadsCase("paired", 2, 7, 6, 64, 64, "tables of each head's own", paired=True),
    HeadsCase("offset", 2, 17, 3, 128, 128, "keys from the token before", offset=True),
    HeadsCase("all", 2, 17, 4, 96, 64, "everything at once", True, True, True, True, True),
    HeadsCase("kept", 3, 9, 2, 64, 64, "keys but across documents", offset=True, first=True),
    HeadsCase("one_token", 2, 1, 2, 64, 64, "every key keeps its own", offset=True, ve=True),
    HeadsCase("odd", 2, 5, 3, 20, 6, "widths that are no vectors", True, True, False, True, True),
    HeadsCase("least", 1, 1, 1, 4, 1, "the smallest"),
    HeadsCase("no_tokens", 2, 0, 3, 64, 64, "nothing to do", offset=True, ve=True, gate=True),
    HeadsCase("no_parts", 0, 5, 3, 64, 64, "nothing to do"),
)

# Layers of the record (RECIPE section 3), at the three stages' tokens.
QK_NORM_ROPE_FULL = tuple(
    HeadsCase(f"{kind}_{stage}", 1, tokens, 6, 128, 128, why, **options)
    for stage, tokens in STAGES
    for kind, why, options in (
        ("short", "layers 4, 7: nothing added", {}),
        ("paired", "layers 0, 5: tables by head", {"paired": True}),
        ("ve", "layers 1, 8: value embedding", {"ve": True, "gate": True}),
        ("long", "layer 10: key offset, added values", {"offset": True, "ve": True}),
    )
)


@dataclasses.dataclass(frozen=True)
class EpilogueCase:
    """Attention's output (tokens, heads, dim); which of its parts follow."""

    name: str
    tokens: int
    heads: int
    dim: int
    why: str
    xsa: bool = True
    gate: bool = True


ATTENTION_EPILOGUE_SMALL = (
    EpilogueCase("whole_block", 16, 2, 128, "rows are whole programs"),
    EpilogueCase("cut", 11, 3, 64, "the last program is cut"),
    EpilogueCase("reduced", 7, 6, 96, "a width that is no power of two"),
    EpilogueCase("xsa", 9, 3, 128, "no gate", gate=False),
    EpilogueCase("gate", 9, 3, 128, "no XSA, so v is not read", xsa=False),
    EpilogueCase("odd", 5, 3, 19, "a width that is no vectors"),
    EpilogueCase("least", 1, 1, 1, "the smallest"),
    EpilogueCase("no_tokens", 0, 3, 64, "nothing to do"),
)

ATTENTION_EPILOGUE_FULL = tuple(
    EpilogueCase(f"{kind}_{stage}", tokens, 6, 128, why, xsa, gate)
    for stage, tokens in STAGES
    for kind, why, xsa, gate in (
        ("xsa", "layers 1, 4, 7", True, False),
        ("both", "layer 3", True, True),
        ("gate", "layer 10", False, True),
    )
)


def document_starts(num_tokens: int, max_seqlen: int | None, num_entries: int) -> list[int]:
    """Lengths like FineWeb's (lognormal, median 403, mean 690), cut; padded with num_tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_tokens // 64 + 1).log_normal_(6.0, 1.04, generator=generator)
    ends = lengths.clamp(1, max_seqlen or num_tokens).int().cumsum(0).tolist()
    starts = [0, *(end for end in ends if end < num_tokens)]
    return starts + [num_tokens] * max(1, num_entries - len(starts))


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """T tokens of documents of at most `max_seqlen` (None: as long as they are) through H heads;
    K head dim of queries and keys, E of values. Paired: H/2 heads of sequences of 2T."""

    name: str
    tokens: int
    max_seqlen: int | None
    window: int
    why: str
    heads: int = 6
    head_dims: tuple[int, int] = (128, 128)
    backward: bool = True
    paired: bool = False

    def starts(self) -> list[int]:
        """Of its sequences, 2T tokens if paired; padded to 128 entries, or as many as there are."""
        times = 2 if self.paired else 1
        return [times * start for start in document_starts(self.tokens, self.max_seqlen, 128)]


def _attention_stages() -> tuple[AttentionCase, ...]:
    """RECIPE section 5 on one of 8 GPUs: short and long windows, plain and paired heads."""
    stages = (
        ("s1", 16384, 896, 128, 384),
        ("s2", 32768, 2048, 384, 896),
        ("s3", 49152, 2048, 640, 1408),
        ("ext", 49152, 2048, 768, 1664),
    )
    cases = []
    for stage, tokens, longest, short, long in stages:
        cases += [
            AttentionCase(f"{stage}_short", tokens, longest, short, "most layers"),
            AttentionCase(f"{stage}_long", tokens, longest, long, "layers 3 and 10"),
            AttentionCase(
                f"{stage}_paired", tokens, longest, short, "two heads in one sequence", paired=True
            ),
        ]
    return tuple(cases)


ATTENTION_FULL = (
    *_attention_stages(),
    AttentionCase(
        "s3_narrow", 49152, 2048, 640, "queries and keys of 96 columns", head_dims=(96, 128)
    ),
    AttentionCase("val_short", 262144, None, 768, "validation: whole documents", backward=False),
    AttentionCase("val_long", 262144, None, 2560, "and the longest window", backward=False),
)
ATTENTION_SMALL = (
    AttentionCase("small", 512, 200, 128, "every backend's path, in a second", 2, (64, 64)),
    AttentionCase("small_long", 512, 200, 600, "large tiles", 2, (64, 64)),
)


@dataclasses.dataclass(frozen=True)
class DcCase:
    """Documents whose heads share their weights over the last `window` tokens."""

    name: str
    cu_seqlens: tuple[int, ...]
    window: int
    heads: int
    key_dim: int
    value_dim: int
    why: str


DC_ATTENTION_SMALL = (
    DcCase("three_blocks", (0, 140), 112, 2, 32, 32, "the record's window, more than two blocks"),
    DcCase("largest_window", (0, 5, 150, 150), 128, 1, 16, 16, "two whole blocks before a query's"),
    DcCase("one_block_back", (0, 150), 65, 2, 16, 16, "reaches the first key of the block before"),
    DcCase("documents", (0, 1, 4, 4, 67, 130, 131), 30, 3, 24, 40, "lengths 0, 1; odd head dims"),
    DcCase("itself", (0, 70), 1, 2, 8, 8, "softmaxes of one score: q and k have no gradient"),
    DcCase("wide_window", (0, 90), 1000, 2, 16, 8, "more than there are tokens"),
    DcCase("odd_heads", (0, 40, 100), 17, 5, 7, 9, "no row is aligned"),
    DcCase("single_tokens", tuple(range(13)), 112, 6, 64, 64, "the record's heads, rows of one"),
)

# The layer of the record that has it, at the three stages: heads of 128, a window of 112.
DC_ATTENTION_FULL = tuple(
    DcCase(stage, tuple(range(0, tokens + 1, 512)), 112, 6, 128, 128, "documents of 512 tokens")
    for stage, tokens in STAGES
)


@dataclasses.dataclass(frozen=True)
class CrossEntropyCase:
    """Logits (rows, cols) against num_targets targets a row, with a prefix target or without."""

    name: str
    rows: int
    cols: int
    num_targets: int
    prefix: bool
    why: str


SOFTCAP_CE_SMALL = (
    CrossEntropyCase("one_vector", 32, 16, 3, True, "most of a cluster's blocks have no columns"),
    CrossEntropyCase("narrow", 16, 48, 3, True, "less than a tile"),
    CrossEntropyCase("one_target", 12, 272, 1, False, "rows that no cluster takes; no prefix"),
    CrossEntropyCase("many_targets", 48, 144, 8, True, "more targets than the record has"),
    CrossEntropyCase("wide", 16, 8208, 2, True, "several tiles, the last one cut"),
    CrossEntropyCase("record", 2, 50304, 3, True, "the record's vocabulary"),
)
# What training does (RECIPE section 5).
SOFTCAP_CE_FULL = tuple(
    CrossEntropyCase(stage, rows, 50304, num_targets, prefix, "logits of one step's part")
    for stage, rows, num_targets, prefix in (
        ("s1", 16384, 3, True),
        ("s2", 32768, 2, True),
        ("s3", 49152, 1, False),
    )
)
