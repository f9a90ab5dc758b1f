"""Hardware that tests need, and where their data is."""

import os
from pathlib import Path

import pytest
import torch

_NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

if not _NUM_GPUS:  # Triton kernels run in its interpreter then; it reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of shared test data: $SPEEDRUN_SHARED_DATA, or ../shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPEEDRUN_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SPEEDRUN_SHARED_DATA to the folder")
    return folder
