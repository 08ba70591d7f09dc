"""Number of CPU threads of a run: chosen once, before the first update, and kept.

The order in which a sum is rounded depends on the number of threads, so the last bits of the
weights do too. A resumed run takes the number from its checkpoint, unless `num_threads` is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ddpm_hf.timing import fastest_num_threads
from ddpm_hf.training.state import CheckpointRecord, ThreadChange


class CpuThreads:
    """Sets the number of threads of this process.

    Args:
        requested: `num_threads` of the options, or None.
        record: of the checkpoint, or None for a new run.
        accelerator: the number is measured for a single process on a CPU only. Several processes
            get theirs from the launcher, and the updates on a GPU do not depend on it.

    Attributes:
        is_unmeasured: whether `choose` is to be called before the first update.
        changes: all changes of the number during the run.
        new_change: the change that this resumed run makes, or None.
    """

    def __init__(
        self, requested: int | None, record: CheckpointRecord | None, accelerator: Accelerator
    ) -> None:
        on_cpu, default = accelerator.device.type == "cpu", torch.get_num_threads()
        self.changes: tuple[ThreadChange, ...] = ()
        self.new_change: ThreadChange | None = None
        recorded = None
        if record is not None:
            self.changes = record.num_threads_changes
            if on_cpu and record.num_processes == accelerator.num_processes:
                recorded = record.num_threads
            if recorded and requested and recorded != requested:
                self.new_change = ThreadChange(record.step + 1, requested, recorded)
                self.changes += (self.new_change,)
        is_single = on_cpu and accelerator.num_processes == 1
        self.is_unmeasured = is_single and not requested and not recorded and default > 1
        torch.set_num_threads(requested or recorded or default)

    def choose(self, trial: Callable[[], Any]) -> int:
        """Set the number of threads with which `trial` is fastest, and return it."""
        number = fastest_num_threads(trial)
        torch.set_num_threads(number)
        self.is_unmeasured = False
        return number
