"""What the tables of the head are made of: emulated forms and peaks of memory."""

import pytest
import torch

from benchmarks import head_error, head_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("drawn", [False, True])
def test_forms_are_in_the_order_of_their_roundings(drawn):
    problem = head_error.heavy_tailed(64, 512, drawn)
    exact = head_error.differentiated(problem, torch.float64)
    found = {n: head_error.errors(f(problem), exact) for n, f in head_error.FORMS.items()}
    bf16, record, _, operands, emulated = found.values()
    for gradient in (1, 2):  # dX, dW
        assert 1e-4 < bf16[gradient] < 0.01
        assert bf16[gradient] < operands[gradient] < record[gradient] < 2**-3
        assert bf16[gradient] < emulated[gradient] < record[gradient]


def test_peak_of_changes():
    assert head_memory.peak_of([3, -1, 2, -4, 1]) == 4
    assert head_memory.peak_of([]) == 0


def test_peak_bytes_sees_what_a_call_holds_at_once():
    def call():
        for _ in range(3):
            x = torch.empty(1 << 20, dtype=torch.uint8)
            y = torch.empty(1 << 19, dtype=torch.uint8)
            del x, y

    assert 1.5 * 2**20 <= head_memory.peak_bytes(call, CPU) < 1.6 * 2**20


def test_chunks_hold_less_than_the_plain_expression(monkeypatch):
    monkeypatch.setitem(head_memory.LOGITS_AT_ONCE, "cpu", 8 * 512)
    calls = head_memory.forms((256, 16, 512), torch.float32, fp8=False, device=CPU)
    plain, chunks = (head_memory.peak_bytes(call, CPU) for call in calls.values())
    assert plain >= 2 * 4 * 256 * 512 > 4 * chunks
