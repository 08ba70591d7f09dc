"""Every test runs on one thread, offline, with deterministic kernels, and leaves nothing behind."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from ipaddress import ip_address

import pytest

# Before torch and the Hugging Face clients are imported, for they read it then; child processes
# inherit it.
_CACHE = tempfile.mkdtemp(prefix="ddpm-hf-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {
    "HF_HOME": f"{_CACHE}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the Xet client talks past the loopback Hub of the tests
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE}/inductor",
}
for name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "PYTHONDONTWRITEBYTECODE",  # people run with compiled code, so tests do
):
    os.environ.pop(name, None)


# Whoever starts the tests in the background may have these ignored, as nohup does. A run leaves a
# signal alone that was ignored when it began, and tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _is_loopback(host: str | bytes | None) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return False


def _refuse_the_network(event: str, args: tuple) -> None:
    """Audit hook: no client written in Python can look up or reach another machine."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _is_loopback(host):
        raise RuntimeError(f"a test tried to reach {host!r}; tests may only use the loopback")


sys.addaudithook(_refuse_the_network)


@pytest.fixture(autouse=True, scope="session")
def deterministic_torch():
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
