"""How the processes of one launch find each other, also after the launcher has restarted them."""

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypedDict
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

CONNECT_S = 300.0
"""Seconds within which all processes must have started."""
_SCHEME = "ddpm-hf"
_POLL_S = 0.05


class Connection(TypedDict):
    """Arguments of `init_process_group`."""

    init_method: str
    timeout: timedelta


def connection(timeout: timedelta) -> Connection:
    """Arguments of `PartialState` and `InitProcessGroupKwargs` that connect the processes.

    A process that does not start within `CONNECT_S` or `timeout`, whichever is shorter, is a
    TimeoutError on all others.

    Args:
        timeout: of the collective operations afterwards.
    """
    return Connection(init_method=f"{_SCHEME}://", timeout=timeout)


def _connect(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """Store, rank and number of processes, as torch's `env://` and without leftovers of a restart.

    Differs from `env://` (torch 2.13), where restarted processes read the addresses of killed ones
    in the store of torchrun and fail (pytorch/pytorch#167288).
    """
    limit = min(timeout, timedelta(seconds=CONNECT_S))
    try:
        for store, rank, count in rendezvous(f"env://?{urlparse(url).query}", timeout=limit):
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                prefix = _common_prefix(store, rank, count, limit.total_seconds())
                store = PrefixStore(prefix, store)
            yield store, rank, count
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TimeoutError(
            f"the {os.environ['WORLD_SIZE']} processes of this launch did not connect through"
            f" {where} in {limit.total_seconds():g} s: {reason}. Run the command on every machine,"
            " and check that each one reaches this address"
        ) from None


def _common_prefix(store: Store, rank: int, count: int, limit_s: float) -> str:
    """A prefix for the keys of this start, the same on all ranks.

    The number of restarts would not do: each launcher counts its own.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"start/{rank}", name)
        prefix = store.get(f"prefix/{name}").decode()  # waits
        store.set(f"{prefix}/joined/{rank}", "")
        return prefix
    missing, until = set(range(1, count)), time.monotonic() + limit_s
    while missing:
        # A name may be that of a killed process, until its successor replaces it.
        for other in [other for other in missing if store.check([f"start/{other}"])]:
            store.set(f"prefix/{store.get(f'start/{other}').decode()}", name)
        missing -= {other for other in missing if store.check([f"{name}/joined/{other}"])}
        if missing and time.monotonic() > until:
            raise dist.DistStoreError(f"no rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL_S)
    return name


register_rendezvous_handler(_SCHEME, _connect)  # type: ignore[no-untyped-call]
