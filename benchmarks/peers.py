"""Other people's kernels, to be timed beside ours: small adapters, used where they can be imported.

Each function here takes a case's tensors and returns the function to be timed, or raises Missing
with the reason, which the benchmark prints. Nothing of these projects is in this one:

    cuBLASLt         torch._scaled_mm
    Inductor         torch.compile on our reference
    modded-nanogpt   triton_kernels.py and train_gpt.py of a folder named by --modded-nanogpt
    quack, Liger, DeepGEMM, dion, gram-newton-schulz, cut-cross-entropy   the packages quack,
                     liger_kernel, deep_gemm, dion, gram_newton_schulz and cut_cross_entropy, if
                     installed
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from speedrun.ops.head_loss import Fp8Head
from speedrun.reference.softcap_ce import Loss, LossAndGrad

_settings: dict[str, Path | bool | None] = {"modded_nanogpt": None, "enabled": True}


class Missing(Exception):
    """This peer can't run here; the message says why."""


def configure(modded_nanogpt: Path | None = None, enabled: bool = True) -> None:
    """Where modded-nanogpt is (a folder with triton_kernels.py), and whether peers run at all."""
    _settings.update(modded_nanogpt=modded_nanogpt, enabled=enabled)


def _need(ok: bool, reason: str) -> None:
    if not _settings["enabled"]:
        raise Missing("--no-peers")
    if not ok:
        raise Missing(reason)


def package(name: str) -> ModuleType:
    """An installed package or one of its modules, such as "quack" or "liger_kernel.ops"."""
    _need(importlib.util.find_spec(name.split(".")[0]) is not None, f"{name} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as problem:  # a package may fail in any way on a machine it isn't made for
        raise Missing(f"{name} can't be imported: {problem}") from problem


def modded_nanogpt(name: str) -> Callable:
    """A function of modded-nanogpt's triton_kernels.py, such as "transpose_copy"."""
    folder = _settings["modded_nanogpt"]
    _need(folder is not None, "no folder named by --modded-nanogpt")
    _need(torch.cuda.is_available(), "modded-nanogpt's kernels need a GPU")
    function = getattr(_modded_nanogpt_module(Path(folder)), name, None)
    _need(function is not None, f"{folder}/triton_kernels.py has no {name}")
    return function


@functools.cache
def _modded_nanogpt_module(folder: Path) -> ModuleType:
    path = folder / "triton_kernels.py"
    _need(path.is_file(), f"there is no {path}")
    spec = importlib.util.spec_from_file_location("modded_nanogpt_triton_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile and Triton look the module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise Missing(f"{path} can't be imported: {problem}") from problem
    return module


def modded_nanogpt_program(name: str, **names: object) -> object:
    """A function of modded-nanogpt's train_gpt.py, which can't be imported: it is a whole run.

    A static method comes as one. `names`: what else the function uses, beside torch and Tensor.
    """
    folder = _settings["modded_nanogpt"]
    _need(folder is not None, "no folder named by --modded-nanogpt")
    path = Path(folder) / "train_gpt.py"
    _need(path.is_file(), f"there is no {path}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            found: dict[str, object] = {"torch": torch, "Tensor": Tensor, **names}
            exec(compile(ast.Module([node], []), str(path), "exec"), found)
            return found[name]
    raise Missing(f"{path} has no {name}")


def modded_nanogpt_optimizer(name: str) -> Callable:
    """A static method of NorMuonAndAdam in modded-nanogpt's train_gpt.py."""
    return modded_nanogpt_program(name).__func__


def modded_nanogpt_polar_express(coefficients: Sequence[Sequence[float]]) -> Callable:
    """Its polar_express(gradient, momentum, μ on the CPU, split_baddbmm), momentum included."""
    kernels = {name: modded_nanogpt(name) for name in ("XXT", "XTX", "ba_plus_cAA")}
    return modded_nanogpt_program("polar_express", polar_express_coeffs=coefficients, **kernels)


def modded_nanogpt_sym_matmul(
    a: Tensor, out: Tensor, trans: bool, alpha: float, beta: float
) -> Callable[[], Tensor]:
    """Its XXT or XTX; or, where beta isn't 0, ba_plus_cAA of a symmetric `a` which is C too."""
    kernel = modded_nanogpt("ba_plus_cAA" if beta else "XTX" if trans else "XXT")
    options = {"alpha": alpha, "beta": beta} if beta else {}
    return lambda: kernel(a, out=out, **options)


def modded_nanogpt_softcap_ce(
    z: Tensor, targets_T: Tensor, loss: Loss, dz_scale: float, transposed: bool
) -> Callable[[], LossAndGrad]:
    """Its kernel on logits z (T, V), and its transpose of the gradient; without log-sum-exp."""
    kernel, transpose = modded_nanogpt("ce_fwd_bwd"), modded_nanogpt("transpose_copy")
    rows, cols = z.shape
    vocabulary = modded_nanogpt("CE_KERNEL_VOCAB_SIZE")
    _need(cols == vocabulary, f"modded-nanogpt's kernel has {vocabulary} columns")
    prefixes, weight = loss.prefix_targets_T, loss.prefix_weight.reshape(1)
    prefixes = torch.full_like(targets_T, -1) if prefixes is None else prefixes

    def call() -> LossAndGrad:
        losses = torch.empty(rows, device=z.device)
        dz = torch.empty(rows, cols, dtype=torch.float8_e5m2, device=z.device)
        inputs = (z, targets_T, loss.weights_N, prefixes, weight)
        sizes = (rows, len(loss.weights_N), loss.a, loss.b, loss.c, dz_scale, 1.0)
        kernel(*inputs, losses, dz, *sizes)
        dz_t = None
        if transposed:
            dz_t = torch.empty(cols, rows, dtype=dz.dtype, device=z.device)
            transpose(dz, dz_t)
        return LossAndGrad(losses, losses.new_empty(0), dz, dz_t)

    return call


def modded_nanogpt_head(
    targets_T: Tensor, loss: Loss, fp8: Fp8Head, dz_scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Its head, differentiable: losses (T,) of x (T, D) and W (D, V), which it casts each time."""
    function = modded_nanogpt("FusedSoftcappedCrossEntropy").apply
    scales = (fp8.x_scale.item(), fp8.w_scale.item(), dz_scale, 1.0)
    prefixes = (loss.prefix_targets_T, loss.prefix_weight)

    def head(x: Tensor, w: Tensor) -> Tensor:
        return function(x, targets_T, loss.weights_N, *prefixes, w, *scales, loss.a, loss.b, loss.c)

    return head


def liger_linear_cross_entropy(
    targets_T: Tensor, softcap: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's, of x (T, D) and W (V, D): the sum of losses, with softcap·tanh(z/softcap)."""
    function = package("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    _need(targets_T.is_cuda, "Liger needs a GPU")
    return lambda x, w: function(x, w, targets_T, reduction="sum", softcap=softcap)


def quack_linear_cross_entropy(
    targets_T: Tensor, softcap: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """quack's, likewise; it has no softcap."""
    function = package("quack.linear_cross_entropy").chunked_linear_cross_entropy
    _need(targets_T.is_cuda, "quack needs a GPU")
    return lambda x, w: function(x, w, targets_T, reduction="sum")


def cut_cross_entropy(targets_T: Tensor, softcap: float) -> Callable[[Tensor, Tensor], Tensor]:
    """apple's, likewise, with softcap·tanh(z/softcap); it leaves out gradients below 2^-12."""
    function = package("cut_cross_entropy").linear_cross_entropy
    _need(targets_T.is_cuda, "cut-cross-entropy needs a GPU")
    return lambda x, w: function(x, w, targets_T, softcap=softcap, reduction="sum")


def quack_sym_matmul(
    a: Tensor, out: Tensor, trans: bool, alpha: float, beta: float
) -> Callable[[], Tensor]:
    """quack's gemm_symmetric; where beta isn't 0, `a` is symmetric and C too."""
    module = package("quack.gemm_interface")
    _need(a.is_cuda, "quack needs a GPU")
    pair = (a.mT, a) if trans else (a, a.mT)
    options = {"C": a, "alpha": alpha, "beta": beta} if beta else {}

    def call() -> Tensor:
        module.gemm_symmetric(*pair, out=out, **options)
        return out

    return call


def dion_sym_matmul(
    a: Tensor, out: Tensor, trans: bool, alpha: float, beta: float
) -> Callable[[], Tensor]:
    """dion's ns_line_1 (A·Aᵀ) and ns_line_2 (of a symmetric `a`, which is C too)."""
    module = package("dion.newton_schulz_triton")
    _need(a.is_cuda, "dion's kernels need a GPU")
    if beta:
        return lambda: module.ns_line_2(a, alpha=alpha, beta=beta, out=out)
    operand = a.mT if trans else a
    return lambda: module.ns_line_1(operand, out=out)


def gram_newton_schulz(
    coefficients: Sequence[Sequence[float]], restarts: Sequence[int], norm_factor: float
) -> Callable[[Tensor], Tensor]:
    """gram-newton-schulz with polynomials that make of X/‖X‖ what ours make of X/(‖X‖·factor)."""
    module = package("gram_newton_schulz")
    _need(torch.cuda.is_available(), "gram-newton-schulz's kernels need a GPU")
    a, b, c = coefficients[0]
    first = [a / norm_factor, b / norm_factor**3, c / norm_factor**5]
    return module.GramNewtonSchulz(
        ns_coefficients=[first, *map(list, coefficients[1:])],
        gram_newton_schulz_reset_iterations=list(restarts),
    )


def inductor(function: Callable, *arguments: object, **options: object) -> Callable[[], object]:
    """`function` compiled by Inductor, called on the arguments; compilation happens at once."""
    _need(True, "")
    compiled = torch.compile(function, dynamic=False)
    call = functools.partial(compiled, *arguments, **options)
    with torch._dynamo.config.patch(recompile_limit=1000):  # a case more than 8 would run eagerly
        call()
    return call


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
) -> Callable[[], Tensor]:
    """cuBLASLt: (M, N) = A (M, K) times B (N, K) transposed, both fp8 row-major; float32 scales."""
    capable = a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9)
    _need(capable, "torch._scaled_mm on fp8 needs a GPU of compute capability 8.9 or more")
    _need(a.dim() == 2, "torch._scaled_mm takes no batches")
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=fast_accum
    )


def deep_gemm_fp8(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
    """DeepGEMM's fp8 product with scales of 1 for each 1 x 128 of A and 128 x 128 of B.

    It has no per-tensor scale: this is its time, for the same product up to one factor.
    """
    module = package("deep_gemm")
    (m, k), n = a.shape, b.shape[0]
    _need(a.is_cuda and k % 128 == 0, "DeepGEMM needs a GPU and K divisible by 128")
    gemm = getattr(module, "fp8_gemm_nt", None)
    _need(gemm is not None, "this deep_gemm has no fp8_gemm_nt")
    scale_a = torch.ones(m, k // 128, device=a.device)
    scale_b = torch.ones(-(-n // 128), k // 128, device=a.device)

    def call() -> Tensor:
        gemm((a, scale_a), (b, scale_b), out)
        return out

    return call


def quack_relu2_mlp(h: Tensor, up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    """quack: relu(h (T, D) times up (F, D) transposed)² in one kernel, times down (F, D)."""
    module = package("quack.gemm_interface")
    _need(h.is_cuda, "quack needs a GPU")

    def call() -> Tensor:
        return module.gemm_act(h, up.mT, activation="relu_sq", store_preact=False)[1] @ down

    return call


def liger_relu2_mlp() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same, differentiable, of cuBLAS and Liger's relu²: a function of h, up and down."""
    relu2 = package("liger_kernel.transformers.relu_squared").LigerReLUSquared()
    _need(torch.cuda.is_available(), "Liger needs a GPU")
    return lambda h, up, down: relu2(h @ up.mT) @ down
