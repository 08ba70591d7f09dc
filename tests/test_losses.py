"""L_simple against its formula written out in float64."""

import pytest
import torch
from torch.testing import assert_close

from ddpm_hf import GaussianDDPMScheduler
from ddpm_hf.losses import simple_loss

STEPS = torch.tensor([0, 3, 500, 999])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    return x_0, noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_is_the_mean_squared_error_of_what_is_predicted_with_weight_one(
    batch, prediction_type
):
    x_0, noise = batch
    scheduler = GaussianDDPMScheduler(prediction_type=prediction_type)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[STEPS].view(-1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    target = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
    }[prediction_type]
    want = (x_t * 0.7 - target).square().mean(dim=(1, 2))

    got = simple_loss(lambda x, t: x * 0.7, scheduler, x_0, STEPS, noise)

    assert got.shape == (4,)
    # float64 throughout; the two routes to alpha_bar differ by rounding of a 1000-term product.
    assert_close(got, want, rtol=1e-10, atol=0)


def test_a_denoiser_may_return_an_object_with_sample(batch):
    x_0, noise = batch

    class Output:
        def __init__(self, sample):
            self.sample = sample

    scheduler = GaussianDDPMScheduler()
    plain = simple_loss(lambda x, t: x, scheduler, x_0, STEPS, noise)
    wrapped = simple_loss(lambda x, t: Output(x), scheduler, x_0, STEPS, noise)
    assert torch.equal(plain, wrapped)


def test_a_half_precision_prediction_is_compared_in_float32(batch):
    x_0, noise = (x.float() for x in batch)
    scheduler = GaussianDDPMScheduler()
    prediction = noise.half() + 2**-10
    want = (prediction.float() - noise).square().mean(dim=(1, 2))
    got = simple_loss(lambda x, t: prediction, scheduler, x_0, STEPS, noise)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_a_prediction_of_another_shape_is_refused_instead_of_broadcast(batch):
    x_0, noise = batch
    with pytest.raises(ValueError, match=r"\(4, 1, 3\).*\(4, 2, 3\)"):
        simple_loss(lambda x, t: x[:, :1], GaussianDDPMScheduler(), x_0, STEPS, noise)
