"""Work in parts that processes share: how far it is."""

import time

from tqdm.auto import tqdm

from ddpm_hf.shared_work import following


def test_the_bar_goes_on_while_this_process_waits_for_the_parts_of_others(monkeypatch):
    monkeypatch.setattr("ddpm_hf.shared_work._LOOK_S", 0.01)
    done = iter([1, 4, 4])
    with tqdm(total=7, disable=False) as bar:
        with following(bar, lambda: next(done, 7)):
            until = time.monotonic() + 30
            while bar.n < 7 and time.monotonic() < until:
                time.sleep(0.01)
        assert bar.n == 7
