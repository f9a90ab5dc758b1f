"""A short run with every technique that applies to bytes, against the losses that it had.

Exact where torch, processor and number of threads are those of the file; elsewhere sums are in
another order, and losses may differ by 1e-3. A change that is meant to change losses renews the
file: `python tests/test_golden_run.py`.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from speedrun import hardware
from speedrun import train as program
from speedrun.failures import Watchdog
from train_helpers import read_losses, tiny_sets, write_text

GOLDEN = Path(__file__).parent / "golden" / "run.json"
LAYERS = "short+paired+ve+save,short+xsa,none+skip+post+save,long+ve+gated+dc+mudd+shared+post"
STEPS = 16
SETS = tiny_sets(
    model__layers=LAYERS,
    model__sign_rows=64,
    model__gate_hidden=8,
    schedule__num_steps=STEPS,
    schedule__stage_ends="0.5,1",
    schedule__stages__1__max_seq_len=96,
    schedule__stages__1__window_long=48,
)


def machine() -> dict[str, str | int]:
    """What exact sums depend on. A virtual machine's processor has a name for many models."""
    facts = {"name": platform.processor()}
    if Path("/proc/cpuinfo").exists():
        pairs = (line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    names = ("model name", "name", "cpu family", "model", "stepping")
    cpu = ", ".join(facts[name] for name in names if name in facts)
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": cpu, "instructions": capability, "threads": 1}


def run_losses(folder: Path) -> list[tuple[str, int, float]]:
    """(event, step, loss) of the run, on one thread."""
    write_text(folder / "text.txt")
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    words = ["--text", str(folder / "text.txt"), "--out", str(folder / "run"), "--device", "cpu"]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(hardware, "num_cpus", lambda: 1)
        try:
            with Watchdog() as watchdog:
                program.main(parser.parse_args([*words, *SETS]), watchdog)
        finally:
            torch.set_num_threads(threads)
    return read_losses(folder / "run")


def test_golden_run(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    losses = run_losses(tmp_path)
    assert [tuple(entry[:2]) for entry in golden["losses"]] == [entry[:2] for entry in losses]
    exact = golden["machine"] == machine()
    for (event, step, expected), (*_, loss) in zip(golden["losses"], losses, strict=True):
        assert loss == (expected if exact else pytest.approx(expected, abs=1e-3)), (event, step)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        content = {"machine": machine(), "losses": run_losses(Path(folder))}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{GOLDEN}: {content['losses'][-1]}")
