"""The MLP with squared ReLU, forward and with gradients, against torch in bf16 and Inductor.

Three choices of GEMMs: record_089's (forward in FP8), all six in FP8, none. These peers compute in
bf16: FP8 and the fused kernels together are ahead of them by so much; `bf16` cases show the second.
modded-nanogpt's MLP is beside its own two choices; quack and Liger, without FP8, in `bf16` cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.fp8_quantize import delayed_scale, refresh_mlp_weights
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms, relu2_mlp
from speedrun.reference import relu2_mlp as reference
from speedrun.reference._fp8 import to_fp8
from speedrun.reference.fp8_quantize import max_abs, scale_of
from tests.cases import RELU2_MLP_FULL, RELU2_MLP_SMALL, MlpCase
from tests.numerics import assert_within_budget, relu2_mlp_budget

ALL_BF16 = Gemms(up="bf16", down="bf16")
CHOICES = {"record": Gemms(), "fp8": Gemms(*["fp8"] * 7, x_scale="static"), "bf16": ALL_BF16}
PEERS = ("torch-bf16", "inductor-bf16")
NUM_CHECKED = 128  # tokens, and rows of the weights' gradients


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the parts of the three stages; "all": also the small cases."""
    for case in RELU2_MLP_FULL if shapes == "record" else RELU2_MLP_FULL + RELU2_MLP_SMALL:
        num_flops = 12 * case.tokens * case.dim * case.hidden
        if too_large_for_cpu(device, 0, num_flops):
            print(f"relu2_mlp {case.name}: left out, {num_flops:.3g} operations for a CPU")
            continue
        for choice in CHOICES:
            yield make(case, choice, False, device)
            yield make(case, choice, True, device)


def make(case: MlpCase, choice: str, backward: bool, device: torch.device) -> Benchmark:
    T, D, F = case.tokens, case.dim, case.hidden
    gemms = CHOICES[choice]

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, device=device)).bfloat16()

    h = torch.nn.functional.rms_norm(random(T, D), (D,)).requires_grad_(backward)
    up, down = (random(F, D, size=d**-0.5).requires_grad_(backward) for d in (D, F))
    grad = random(T, D, size=1e-3)
    layer, scales = None, {"up": 1.0, "down": 1.0, "post": 1.0}
    with torch.no_grad():
        post_amax = reference.relu2_up(h, up).amax().float()
    sizes = {"h": h.abs().max().item(), "grad": grad.abs().max().item(), "post": post_amax.item()}
    if choice != "bf16":
        no_amax = torch.zeros(1, device=device)
        weights = torch.stack([up.detach(), down.detach()])
        w = refresh_mlp_weights(weights, no_amax, False, up_t=True, down_row=True)
        fp8 = (w.up_f8, w.up_f8_t, w.up_scale, w.down_f8, w.down_f8_t, w.down_scale)
        layer = Fp8Layer(gemms, *(t[0] for t in fp8), delayed_scale(post_amax))
        scales = {"up": layer.up_scale, "down": layer.down_scale, "post": layer.post_scale}

    def both(forward: Callable[..., Tensor], *extra: Fp8Layer | None) -> tuple[Tensor, ...]:
        y = forward(h, up, down, *extra)
        return (y, *torch.autograd.grad(y, (h, up, down), grad)) if backward else (y,)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        """Some tokens of y and dx, through all of F; some rows of the weights' gradients."""
        used = ALL_BF16 if name in PEERS else gemms
        with torch.no_grad():
            some = slice(T // 2, T // 2 + NUM_CHECKED)
            tokens = relu2_mlp_budget(h[some], up, down, grad[some], used, sizes, scales)
            for found, budget in zip(result[:2], tokens, strict=False):
                assert_within_budget(found[some], budget)
            some = slice(F // 3, F // 3 + NUM_CHECKED)
            hidden = relu2_mlp_budget(h, up[some], down[some], grad, used, sizes, scales)
            for found, budget in zip(result[2:], hidden[2:], strict=False):
                assert_within_budget(found[some], budget)

    def torch_bf16() -> Callable[[], tuple[Tensor, ...]]:
        peers.package("torch")  # refused where no peers are wanted
        return lambda: both(reference.relu2_mlp)

    def inductor() -> Callable[[], tuple[Tensor, ...]]:
        compiled = peers.inductor(reference.relu2_mlp, h, up, down).func
        return lambda: both(compiled)

    def modded_nanogpt() -> Callable[[], tuple[Tensor, ...]]:
        mlp = peers.modded_nanogpt("FusedLinearReLUSquareFunction").apply
        if choice == "bf16":
            return lambda: both(mlp)
        if choice == "fp8":
            raise peers.Missing("its backward pass is in bf16")
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        partial_amax = torch.zeros(num_sms, device=device)
        quantize = torch.compile(current_e4m3, dynamic=False)

        def forward(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
            x_f8, x_scale = quantize(h.detach())
            weights = layer.down_f8_DF.mT, layer.down_scale
            x = layer.up_f8_FD, layer.up_scale * x_scale, x_f8
            return mlp(h, up, down, *x, *weights, layer.post_scale, partial_amax)

        return lambda: both(forward)

    def quack() -> Callable[[], tuple[Tensor, ...]]:
        if choice != "bf16" or backward:
            raise peers.Missing("its product with relu² is in 16 bits and has no gradient")
        call = peers.quack_relu2_mlp(h, up, down)
        return lambda: (call(),)

    def liger() -> Callable[[], tuple[Tensor, ...]]:
        if choice != "bf16":
            raise peers.Missing("it has no FP8")
        mlp = peers.liger_relu2_mlp()
        return lambda: both(mlp)

    kinds = list(gemms[:6] if backward else gemms[:2])
    flops = {kind: 2 * T * D * F * kinds.count(kind) for kind in ("bf16", "fp8")}
    post_bytes = T * F * (1 if gemms.post == "fp8" else 2)
    num_bytes = 4 * T * D + 4 * F * D + post_bytes  # h, y, weights, post
    if backward:
        num_bytes += 6 * T * D + 8 * F * D + post_bytes  # h, grad, dx; weights and gradients; post
    return Benchmark(
        stem="relu2_mlp",
        case=f"{case.name} {choice} {'forward+backward' if backward else 'forward'}",
        call=lambda: both(relu2_mlp, layer),
        check=check,
        num_bytes=num_bytes,
        num_flops={kind: count for kind, count in flops.items() if count},
        peers={
            "torch-bf16": torch_bf16,
            "inductor-bf16": inductor,
            "modded-nanogpt": modded_nanogpt,
            "quack": quack,
            "liger": liger,
        },
    )


def current_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3 by its own amax, and the scale."""
    scale = scale_of(max_abs(x))
    return to_fp8(x, scale, torch.float8_e4m3fn), scale
