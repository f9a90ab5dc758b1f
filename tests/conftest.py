"""Hardware that tests need, and where their data is."""

import os
from pathlib import Path

import pytest
import torch

_NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
_SHARED_DATA = "SPEEDRUN_SHARED_DATA"  # in each reason of a skip for data that isn't there

if not _NUM_GPUS:  # Triton kernels run in its interpreter then; it reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--shared-data",  # ./test.sh --fixtures; pytest's own --fixtures lists fixtures
        metavar="PATH",
        help="folder of shared test data, which holds golden_089; a skip for want of it fails",
    )


def pytest_configure(config):
    path = config.getoption("--shared-data")
    if path is None:
        return
    folder = Path(path).resolve()
    if not (folder / "golden_089").is_dir():
        raise pytest.UsageError(
            f"--shared-data {path}: no folder golden_089 in it; give its parent"
        )
    os.environ[_SHARED_DATA] = str(folder)


def _missing_hardware(marker: str) -> str:
    if marker == "gpu" and not _NUM_GPUS:
        return "needs a CUDA device, this machine has none"
    if marker == "sm90" and not (_NUM_GPUS and torch.cuda.get_device_capability() == (9, 0)):
        return "needs a Hopper GPU (compute capability 9.0), this machine has none"
    if marker == "multigpu" and _NUM_GPUS < 2:
        return f"needs two CUDA devices, this machine has {_NUM_GPUS}"
    return ""


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in ("gpu", "sm90", "multigpu"):
            if item.get_closest_marker(marker) and _missing_hardware(marker):
                item.add_marker(pytest.mark.skip(reason=_missing_hardware(marker)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    folder = item.config.getoption("--shared-data") and os.environ[_SHARED_DATA]
    if folder and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if _SHARED_DATA in reason or folder in reason:
            report.outcome = "failed"
            report.longrepr = f"skipped in spite of --shared-data: {reason}"
    return report


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--shared-data"):
        names = ("passed", "failed", "error", "skipped")
        counts = (f"{len(terminalreporter.getreports(name))} {name}" for name in names)
        terminalreporter.write_line(
            f"--shared-data {os.environ[_SHARED_DATA]}: {', '.join(counts)}"
        )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of shared test data: $SPEEDRUN_SHARED_DATA, or ../shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(_SHARED_DATA, default))
    if not (folder / "golden_089").is_dir():
        pytest.skip(f"no golden_089 in {folder}; {_SHARED_DATA} names the folder")
    return folder
