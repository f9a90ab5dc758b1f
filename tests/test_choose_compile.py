"""What --compile auto means."""

import pytest
import torch

from speedrun import train
from speedrun.comms import Comms


@pytest.mark.parametrize(
    ("device", "backend", "wanted"),
    [("cpu", "torch", "off"), ("cuda", "torch", "regional"), ("cuda", "triton", "off")],
)
def test_auto(monkeypatch, device, backend, wanted):
    monkeypatch.setattr(train, "decide", lambda op, device, triton: backend)
    run = train.Run(Comms(0, 1), torch.device(device), torch.bfloat16)
    assert train.choose_compile("auto", run) == wanted
    assert train.choose_compile("full", run) == "full"
