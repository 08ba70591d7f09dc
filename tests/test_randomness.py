"""Order, noise and timesteps are functions of the position."""

import pytest
import torch

from ddpm_hf.data.image_order import Batches
from ddpm_hf.randomness import dropped_labels, noise_of_rows, seed_of, timestep_generator


def shares(num_processes, accumulation, *, start=0, stop=5, num_images=10, batch_size=12):
    """All global batches as lists of rows, assembled from the micro-batches of all processes."""
    parts = [
        Batches(num_images, 7, batch_size, start, stop, rank, num_processes, accumulation)
        for rank in range(num_processes)
    ]
    micro_batches = [list(part) for part in parts]
    whole = []
    for step in range(stop - start):
        batch = [None] * batch_size
        for part, mine in zip(parts, micro_batches, strict=True):
            for micro_step in range(accumulation):
                places = mine[step * accumulation + micro_step]
                for row, place in zip(part.rows(micro_step), places, strict=True):
                    assert batch[row] is None
                    batch[row] = place
        whole.append(batch)
    return whole


def test_every_epoch_is_a_different_permutation_of_the_images():
    positions = [position for batch in shares(1, 1) for position in batch]
    epochs = [[index for e, index in positions if e == epoch] for epoch in range(6)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 6


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_batches_do_not_depend_on_processes_and_accumulation(num_processes, accumulation):
    assert shares(num_processes, accumulation) == shares(1, 1)


def test_batches_can_start_at_any_update():
    assert shares(2, 2, start=3) == shares(2, 2)[3:]


def test_another_seed_gives_another_order():
    first, second = (list(Batches(50, seed, 50, 0, 1)) for seed in (0, 1))
    assert first != second


def test_the_noise_of_a_row_does_not_depend_on_the_micro_batch():
    x_0 = torch.zeros(8, 1, 4, 4)
    noise = noise_of_rows(0, 5, range(8), x_0)
    for rows in (range(4), range(3, 5), range(7, 8)):
        part = slice(rows.start, rows.stop)
        assert torch.equal(noise_of_rows(0, 5, rows, x_0[part]), noise[part])


def test_noise_is_standard_normal():
    x_0 = torch.zeros(16, 1, 16, 16)
    noise = torch.cat([noise_of_rows(3, step, range(16), x_0) for step in range(250)])
    count = noise.numel()
    # z bounds of 4 standard errors; the seed is fixed.
    assert abs(noise.mean().item()) < 4 / count**0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / count) ** 0.5


def test_noise_is_uncorrelated_within_a_batch_and_between_updates():
    x_0 = torch.zeros(2, 3, 32, 32)
    first, second = (noise_of_rows(0, step, range(2), x_0) for step in (0, 1))
    rows = torch.stack([*first.flatten(1), *second.flatten(1)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 4 / rows.shape[1] ** 0.5


def test_timesteps_of_different_updates_are_uniform():
    cpu = torch.device("cpu")
    draws = [
        torch.randint(10, (16,), generator=timestep_generator(3, step, cpu)) for step in range(250)
    ]
    counts = torch.cat(draws).bincount(minlength=10)
    chi_squared = ((counts - 400.0) ** 2 / 400).sum().item()
    assert chi_squared < 27.9  # 0.1% point of chi squared with 9 degrees of freedom


def test_seeds_differ_for_similar_positions():
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", 23), seed_of(1, "23")}) == 4


def test_seeds_batches_noise_and_timesteps_equal_those_of_earlier_releases():
    """A newer release resumes a run with the same numbers."""
    cpu = torch.device("cpu")
    assert seed_of(0, "noise", 3, 1) == 8571838569191842698
    assert seed_of("a", 1) == 5566339428396816726
    batches = list(Batches(10, seed=7, batch_size=6, start=1, stop=3))
    assert batches == [
        [(0, 4), (0, 5), (0, 6), (0, 2), (1, 1), (1, 3)],
        [(1, 4), (1, 8), (1, 0), (1, 5), (1, 6), (1, 2)],
    ]
    t = torch.randint(1000, (8,), generator=timestep_generator(7, 3, cpu))
    assert t.tolist() == [81, 339, 976, 523, 62, 481, 330, 438]
    noise = noise_of_rows(7, 3, range(1, 3), like=torch.zeros(2, 1, 1, 4))
    want = torch.tensor([[-1.9655, 0.4087, -0.2743, 0.0897], [0.6236, 1.4249, -0.7199, -2.1604]])
    # Half of the last digit; kernels may round logarithms and cosines differently.
    assert torch.allclose(noise.reshape(2, 4), want, rtol=0, atol=5.1e-5)
    assert dropped_labels(7, 3, 8, 0.5, cpu).nonzero().flatten().tolist() == [0, 3, 4]
