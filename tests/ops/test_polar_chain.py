"""`polar_chain`: the Gram form's steps in one launch, and `polar_express` on it."""

import math

import pytest
import torch

from chain_cases import POLAR_CHAIN_FULL, POLAR_CHAIN_SMALL, ChainCase
from numerics import assert_same_bits
from op_helpers import relative, skips_without_cuda_kernel
from speedrun import ops
from speedrun.ops import _polar_express_banks
from speedrun.ops._dispatch import Unavailable, library_problem
from speedrun.ops._polar_express_banks import ChainOfProducts
from speedrun.ops.polar_chain import MAX_STEPS, num_slots, polar_chain, serves_polar_express
from speedrun.ops.polar_express import PolarExpress, polar_express
from speedrun.reference import polar_express as reference
from speedrun.reference.polar_express import COEFFICIENTS
from train_helpers import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAM = PolarExpress(form="gram")


@pytest.fixture(params=["torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """Its name, while it serves all operators."""
    if request.param == "cuda" and library_problem():
        pytest.skip(library_problem())
    with ops.use_backend(request.param):
        yield request.param


def workspace(case: ChainCase, dtype=torch.float16, seed=0):
    """R = XXᵀ of normalised X in the first slot; NaN, which would be seen, in all others."""
    x = normal(case.batch, case.n, 3 * case.n, seed=seed)
    x = reference.normalized(x, dtype, GRAM).double()
    work = torch.full((num_slots(case.steps), case.batch, case.n, case.n), math.nan, dtype=dtype)
    work[0] = (x @ x.mT).to(dtype)
    return work.to(DEVICE)


def call(work, steps=3):
    with skips_without_cuda_kernel():
        return polar_chain(work, COEFFICIENTS[:steps])


def assert_near(found, work, steps):
    """Both are roundings of one chain: found may be half as far again from the exact result."""
    same, exact = work.clone(), work.double()
    with ops.use_backend("torch"):
        polar_chain(same, COEFFICIENTS[:steps])
        polar_chain(exact, COEFFICIENTS[:steps])
    assert relative(found, exact[-1]) <= 1.5 * relative(same[-1], exact[-1])


@pytest.mark.parametrize("case", POLAR_CHAIN_SMALL, ids=lambda case: case.name)
def test_accurate(case, backend):
    work = workspace(case)
    r = work[0].clone()
    found = call(work, case.steps)
    assert found.data_ptr() == work[-1].data_ptr()
    assert_near(found, work, case.steps)
    assert_same_bits(found, found.mT.contiguous())
    assert_same_bits(work[0], r)


@pytest.mark.gpu
@pytest.mark.parametrize("case", POLAR_CHAIN_FULL, ids=lambda case: case.name)
def test_record_shapes_cuda(case):
    with ops.use_backend("cuda"):
        work = workspace(case)
        assert_near(call(work, case.steps), work, case.steps)


def test_eigenvalues_go_through_the_polynomials(backend):
    """The definition: a step makes r·z² of R's eigenvalue r, q·z of Q's; z = a + b·r + c·r²."""
    if backend != "torch":
        pytest.skip("float64 has no kernel")
    work = workspace(ChainCase("", 2, 24, 3, ""), torch.float64)
    r, vectors = torch.linalg.eigh(work[0])
    q = torch.ones_like(r)
    for a, b, c in COEFFICIENTS[:3]:
        z = a + b * r + c * r * r
        q, r = q * z, r * z * z
    expected = vectors @ torch.diag_embed(q) @ vectors.mT
    torch.testing.assert_close(call(work), expected, rtol=1e-9, atol=1e-9)


def test_agrees_with_products_one_by_one(backend):
    """ChainOfProducts, which polar_chain stands in for: but for the order of sums."""
    work = workspace(ChainCase("", 3, 256, 3, ""))
    r = work[0].clone()
    found = call(work)
    with ops.use_backend("torch"):
        one_by_one = ChainOfProducts(r)(COEFFICIENTS[:3])
    assert relative(found, one_by_one) < 1e-3  # about two units of fp16


def test_two_runs_are_bitwise_equal(backend):
    """The second finds the workspace, and the memory of the counters, as the first left them."""
    work = workspace(POLAR_CHAIN_SMALL[2])
    first = call(work, 2).clone()
    assert_same_bits(call(work, 2), first)


@pytest.mark.gpu
def test_replays_in_a_graph_cuda():
    """Each replay clears its counters: on another R it gives another Q, which is that R's."""
    with ops.use_backend("cuda"):
        case = ChainCase("", 3, 768, 3, "")
        work, other = workspace(case), workspace(case, seed=1)
        expected = [call(w).clone() for w in (work, other)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(work)
        for r, q in zip((work[0].clone(), other[0]), expected, strict=True):
            work[0] = r
            work[1:] = math.nan
            graph.replay()
            assert_same_bits(found, q)


def test_bad_values_stay_in_their_matrix(backend):
    work = workspace(ChainCase("", 3, 128, 2, ""))
    work[0, 1, 5, 5] = math.inf
    found = call(work, 2)
    assert not found[1].isfinite().any() and found[::2].isfinite().all()


@pytest.mark.parametrize("shape", [(7, 0, 128, 128), (7, 2, 0, 0), (3, 1, 1, 1)], ids=str)
def test_empty_and_one_row(shape):
    work = torch.ones(shape, dtype=torch.float16, device=DEVICE)
    found = polar_chain(work, COEFFICIENTS[: (shape[0] + 1) // 4])
    assert found.shape == shape[1:]
    if found.numel():
        assert found.item() == pytest.approx(sum(COEFFICIENTS[0]), abs=2**-8)  # Z is rounded first


def test_opcheck(backend):
    work = workspace(ChainCase("", 2, 128, 2, ""))
    counters = torch.zeros(num_slots(2), 2, 1, dtype=torch.int32, device=DEVICE)
    numbers = [number for abc in COEFFICIENTS[:2] for number in abc]
    operator = torch.ops.speedrun.polar_chain_out.default
    torch.library.opcheck(operator, (work, counters, numbers))


def test_compiles_fullgraph_without_recompiling(backend):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            work = workspace(ChainCase("", 2, 128, 3, ""), seed=seed)
            assert_same_bits(compiled(work.clone()), call(work))


def test_refuses_readably():
    work = torch.zeros(7, 2, 128, 128, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"for 3 steps .* got \(7, 2, 128, 128\)"):
        polar_chain(work, COEFFICIENTS[:3])
    with pytest.raises(ValueError, match=r"at least one step"):
        polar_chain(work, ())
    with pytest.raises(ValueError, match=r"got \(7, 2, 128, 64\)"):
        polar_chain(work[..., :64], COEFFICIENTS[:2])
    with pytest.raises(ValueError, match=r"contiguous, got strides \(\d+, \d+, 1, 128\)"):
        polar_chain(work.mT, COEFFICIENTS[:2])
    with pytest.raises(TypeError, match=r"type torch\.int32"):
        polar_chain(work.int(), COEFFICIENTS[:2])


# ---- In polar_express ------------------------------------------------------------------------


def test_polar_express_in_chains(backend, monkeypatch):
    """Of the Gram form each run of steps between restarts is one call, for all banks of one n."""
    calls = []

    def counted(work, steps):
        calls.append((tuple(work.shape), len(steps)))
        return polar_chain(work, steps)

    banks = [
        normal(*shape, seed=i).to(DEVICE) for i, shape in enumerate([(2, 128, 384), (1, 200, 128)])
    ]
    one_by_one = polar_express(banks, torch.float16, GRAM)
    monkeypatch.setattr(_polar_express_banks, "serves_polar_express", lambda *arguments: True)
    monkeypatch.setattr(_polar_express_banks, "polar_chain", counted)
    with skips_without_cuda_kernel():
        xs = [reference.normalized(bank, torch.float16, GRAM) for bank in banks]
        found = _polar_express_banks.run_banks(xs, GRAM)
    assert calls == [((7, 3, 128, 128), 2), ((11, 3, 128, 128), 3)]
    for mine, other, bank in zip(found, one_by_one, banks, strict=True):
        exact = polar_express(bank.double(), spec=GRAM)
        assert relative(mine, exact) <= 1.5 * relative(other, exact)


def test_it_serves_where_it_has_passed_or_is_named(monkeypatch):
    device, chains = torch.device("cuda"), GRAM.chains
    asked = []

    def decide(op, device, kernel=""):
        asked.append((op, kernel))
        return "cuda" if kernel else "torch"

    monkeypatch.setattr("speedrun.ops.polar_chain.decide", decide)
    monkeypatch.setattr("speedrun.ops.polar_chain.is_hopper", lambda device: True)
    assert serves_polar_express(device, torch.float16, 768, chains)
    assert not serves_polar_express(device, torch.bfloat16, 768, chains)
    assert not serves_polar_express(device, torch.float16, 200, chains)
    assert not serves_polar_express(device, torch.float16, 768, (COEFFICIENTS * 2,))
    assert len(COEFFICIENTS * 2) > MAX_STEPS
    assert asked == [("polar_chain", "polar_chain_out"), *[("polar_chain", "")] * 3]
    with ops.use_backend("cuda"):  # of all operators
        assert not serves_polar_express(device, torch.float16, 768, chains)
    with ops.use_backend("cuda", "polar_chain"):
        assert serves_polar_express(device, torch.float16, 768, chains)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it serves")
def test_a_named_override_that_cannot_serve_says_so():
    xs = [normal(1, 128, 256).half()]
    with ops.use_backend("cuda", "polar_chain"), pytest.raises(Unavailable, match="polar_chain"):
        _polar_express_banks.run_banks(xs, GRAM)
    _polar_express_banks.run_banks(xs, GRAM)
