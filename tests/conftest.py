"""Settings of all tests: one thread, offline, deterministic kernels, temporary caches."""

import atexit
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
from ipaddress import ip_address

import jinja2
import pytest

# Set before torch and the Hugging Face clients are imported, because they read these variables on
# import; subprocesses inherit them.
_CACHE = tempfile.mkdtemp(prefix="ddpm-hf-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {
    "HF_HOME": f"{_CACHE}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the Xet client bypasses the local Hub server of the tests
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # the second thread of a few tests waits without a core
    "TRACKIO_DIR": f"{_CACHE}/trackio",
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE}/inductor",
}
for name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "PYTHONDONTWRITEBYTECODE",  # compiled code, as in normal use
):
    os.environ.pop(name, None)

# Without flushing files to the disk, which would take longer than everything else: no test cuts the
# power. test_damaged_parts.py checks what is flushed, and when.
os.fsync = lambda descriptor: None

# Background jobs may ignore these signals, for example under nohup, and a training run does not
# handle a signal that was ignored when it started; the tests send them.
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
    """Audit hook: block name lookups and connections to other machines."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _is_loopback(host):
        raise RuntimeError(
            f"a test tried to reach {host!r}; tests may use the loopback interface only"
        )


sys.addaudithook(_refuse_the_network)


# huggingface_hub compiles the template of each model card anew, which takes longer than an update
# of the networks here.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)


@pytest.fixture(autouse=True, scope="session")
def fast_garbage_collection():
    """A collection skips the million objects of the libraries that the test modules imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def deterministic_torch():
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """An Accelerator that a test leaves would set the precision and the compiler of later runs."""
    yield
    if state := sys.modules.get("accelerate.state"):
        is_left = bool(state.AcceleratorState._shared_state)
        state.AcceleratorState._reset_state()
        assert not is_left


@pytest.fixture(scope="session")
def hub_server():
    """A Hub on the loopback interface, for `hub` and `hub_process`."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def hub_process(hub_server, tmp_path_factory):
    """A process with the package that uses this Hub.

    Its cache lasts as long, so repositories of different tests have different names.
    """
    from hub_server import HubClient

    with HubClient(hub_server, tmp_path_factory.mktemp("hub") / "home") as client:
        yield client


@pytest.fixture
def hub(hub_server):
    """The Hub without repositories and faults."""
    hub_server.reset()
    return hub_server
