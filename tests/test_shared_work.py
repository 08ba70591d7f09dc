"""Progress of work that processes share."""

import time

from tqdm.auto import tqdm

from ddpm_hf.utils.shared_work import progress_from


def test_the_progress_bar_advances_while_this_process_waits_for_others(monkeypatch):
    monkeypatch.setattr("ddpm_hf.utils.shared_work._PROGRESS_INTERVAL_S", 0.01)
    done = iter([1, 4, 4])
    with tqdm(total=7, disable=False) as bar:
        with progress_from(bar, lambda: next(done, 7)):
            until = time.monotonic() + 30
            while bar.n < 7 and time.monotonic() < until:
                time.sleep(0.01)
        assert bar.n == 7
