"""Growth of the memory of this process inside a block, from its peak as Linux counts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Growth:
    """Peak memory above that at the start; 0 on systems without /proc."""

    num_bytes: int = 0


@contextmanager
def peak_memory_growth() -> Iterator[Growth]:
    """Measure the growth of the resident memory until the block ends."""
    growth = Growth()
    if not _CLEAR.exists():
        yield growth
        return
    _CLEAR.write_text("5")  # resets the peak
    before = _kilobytes("VmRSS")
    yield growth
    growth.num_bytes = 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0])
