"""Number of CPU threads of a run: chosen once, before the first update, and kept.

The order in which a sum is rounded depends on the number of threads, so the last bits of the
weights do too. A resumed run takes the number from its checkpoint, unless `num_threads` is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ddpm_hf.training.checkpoint_record import CheckpointRecord, ThreadChange
from ddpm_hf.utils.timing import fastest_num_threads


class CpuThreads:
    """Sets the number of threads of this process.

    Args:
        requested: `num_threads` of the options, or None.
        record: of the checkpoint, or None for a new run.
        accelerator: the number is measured for a single process on a CPU only. Several processes
            get theirs from the launcher, and the updates on a GPU do not depend on it.

    Attributes:
        is_unmeasured: whether `choose` must be called before the first update.
    """

    def __init__(
        self, requested: int | None, record: CheckpointRecord | None, accelerator: Accelerator
    ) -> None:
        on_cpu, num_processes = accelerator.device.type == "cpu", accelerator.num_processes
        default = torch.get_num_threads()
        self._record = record if on_cpu else None
        # Another number of processes changes the sums anyway.
        known = record if on_cpu and record and record.num_processes == num_processes else None
        number = requested or (known.num_threads if known else None)
        self.is_unmeasured = number is None and on_cpu and num_processes == 1 and default > 1
        torch.set_num_threads(number or default)

    def choose(self, trial: Callable[[], Any]) -> int:
        """Set the number of threads with which `trial` is fastest, and return it."""
        number = fastest_num_threads(trial)
        torch.set_num_threads(number)
        self.is_unmeasured = False
        return number

    @property
    def new_change(self) -> ThreadChange | None:
        """The change that this resumed run makes, or None."""
        record, number = self._record, torch.get_num_threads()
        if record is None or record.num_threads in (None, number):
            return None
        return ThreadChange(record.step + 1, number, record.num_threads)

    @property
    def changes(self) -> tuple[ThreadChange, ...]:
        """All changes during the run."""
        before = self._record.num_threads_changes if self._record else ()
        return (*before, self.new_change) if self.new_change else before
