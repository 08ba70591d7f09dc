"""Every test runs on one thread, offline, with deterministic kernels."""

import os

# Set before torch is imported: the clients read them then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def deterministic_torch():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
