"""Feature networks, their preprocessing, and metrics with intervals and floors."""

import numpy as np
import pytest
import torch
from hub_server import ClientError
from PIL import Image
from sklearn.datasets import load_digits
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from ddpm_hf.evaluation.features import features_of, load_features, resized, to_rgb
from ddpm_hf.evaluation.metrics import measure
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.utils.shared_work import distributed_state


def image_set(pixels):
    return DrawnImages(pixels.shape, lambda rows: pixels[rows.start : rows.stop : rows.step])


def random_pixels(*shape, dtype=np.uint8):
    most = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, most, shape, dtype=dtype)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_resizing_matches_pil_in_float(size):
    pixels = random_pixels(2, 16, 24, 3)
    planes = to_rgb(pixels).numpy()
    want = np.stack([
        [np.asarray(Image.fromarray(p, "F").resize((size, size), Image.BICUBIC)) for p in image]
        for image in planes
    ]).clip(0, 1)  # fmt: skip
    # Filter weights are accurate to about 1e-6 from float32 positions; sums have up to 60 terms.
    assert resized(torch.from_numpy(planes), size).numpy() == pytest.approx(want, abs=1e-5)


def test_grey_alpha_and_bit_depth_are_preprocessed_alike():
    colour = random_pixels(2, 4, 4, 3)
    grey, alpha = colour[..., :1], random_pixels(2, 4, 4, 1)
    x, a = colour / 255, alpha / 255
    over_white = x * a + 1 - a
    cases = [
        (colour, x),
        (grey, np.repeat(grey / 255, 3, 3)),
        (np.concatenate([colour, alpha], 3), over_white),
        (np.concatenate([grey, alpha], 3), np.repeat(over_white[..., :1], 3, 3)),
        (grey.astype(np.uint16) * 257, np.repeat(grey / 255, 3, 3)),
    ]
    for pixels, want in cases:
        assert to_rgb(pixels).numpy() == pytest.approx(want.transpose(0, 3, 1, 2), abs=1e-6)
    with pytest.raises(ValueError, match="1 to 4 channels, got 5"):
        to_rgb(random_pixels(1, 4, 4, 5))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    sizes = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}}
    BitImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_transformers_model_uses_the_statistics_of_its_processor(backbone):
    features = load_features(str(backbone))
    pixels = random_pixels(3, 8, 8, 1)
    processor = BitImageProcessorPil.from_pretrained(backbone)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    model = Dinov2Model.from_pretrained(backbone).eval()
    with torch.inference_mode():
        want = model((resized(to_rgb(pixels), 28) - mean) / std).pooler_output
    torch.testing.assert_close(features(pixels), want)
    assert features.facts()["name"] == backbone.name  # the path stays private


@pytest.mark.slow
def test_a_hub_model_is_downloaded_without_pickled_weights(backbone, hub, hub_process):
    code = """
from ddpm_hf.evaluation.features import load_features
from pathlib import Path
features = load_features("user/eyes")
pickled = [path.name for path in Path(HOME).glob("hub/models--user--eyes/**/*.bin")]
result = [features.name, features.digest, pickled]
"""
    hub.add_folder("user/eyes", backbone)
    hub.edit("user/eyes", {"pytorch_model.bin": b"never opened"})
    home = str(hub_process.log.parent)
    assert hub_process.run(code, HOME=home) == [
        "user/eyes", load_features(str(backbone)).digest, [],
    ]  # fmt: skip
    with pytest.raises(ClientError, match="cannot be loaded: user/ears is not on the Hub"):
        hub_process.run(code.replace("eyes", "ears"), HOME=home)


def test_only_the_vision_part_of_a_text_image_model_is_used(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=small | {"num_attention_heads": 2, "vocab_size": 9},
        vision_config=small | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    CLIPModel(config).save_pretrained(tmp_path)
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    assert load_features(str(tmp_path))(random_pixels(2, 8, 8, 3)).shape == (2, 16)


@pytest.mark.slow
def test_modules_callables_and_efficientnet_are_feature_networks():
    pixels = random_pixels(2, 8, 8, 1)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5), torch.nn.Dropout())
    features = load_features(module)
    assert features(pixels).shape == (2, 5)
    assert features.digest != load_features(torch.nn.Linear(192, 5)).digest
    assert load_features(lambda x: x.mean((2, 3)))(pixels).shape == (2, 3)
    real = load_features("efficientnet-lite0")
    assert real(pixels).shape == (2, 1280)
    assert torch.equal(real(pixels), load_features("efficientnet-lite0")(pixels))
    with pytest.raises(
        ValueError, match=r"'user/none' cannot be loaded: .*efficientnet-lite0 or p"
    ):
        load_features("user/none")


def test_a_missing_pooler_is_skipped_and_another_missing_layer_is_an_error(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    first, second = load_features(str(tmp_path)), load_features(str(tmp_path))
    pixels = random_pixels(2, 8, 8, 1)
    assert torch.equal(first(pixels), second(pixels))
    assert first.digest == second.digest
    weights = {name: x for name, x in model.state_dict().items() if "layernorm" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"no weights for \S*layernorm"):
        load_features(str(tmp_path))


def test_the_digest_distinguishes_layers_without_weights():
    layers = [torch.nn.Sequential(layer, torch.nn.Flatten()) for layer in (
        torch.nn.AvgPool2d(2), torch.nn.MaxPool2d(2)
    )]  # fmt: skip
    assert load_features(layers[0]).digest != load_features(layers[1]).digest


def test_features_of_a_set_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    pixels, calls, state = random_pixels(600, 4, 4, 1), [], distributed_state()

    class Network(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.flatten(1)

    features, images = load_features(Network()), image_set(pixels)
    first = features_of(images, features, state, batch_size=100, progress=False)
    assert torch.equal(first, to_rgb(pixels).flatten(1))
    assert sum(calls) == 600
    again = features_of(image_set(pixels.copy()), features, state, batch_size=100, progress=False)
    assert torch.equal(again, first)
    assert sum(calls) == 600
    pixels[599] ^= 1
    features_of(images, features, state, rows=range(590, 600), batch_size=100, progress=False)
    assert sum(calls) == 610


@pytest.fixture(scope="module")
def digits():
    """Pixel values and classes of the digits of scikit-learn, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(images[order] / 16), labels[order]


def figures(metric, real, drawn, held_out=None):
    return {figure.name: figure for figure in measure(metric, real, drawn, held_out)}


@pytest.mark.slow
def test_each_metric_detects_its_defect_and_calls_real_images_a_tie(digits):
    x, labels = digits
    real, other = x[:500], x[500:1000]
    noisy = other + 0.3 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    fewer = x[500:][torch.from_numpy(labels[500:] < 5)][:500]
    for metric in ("fd", "kid", "precision-recall", "coverage", "memorisation"):
        for figure in figures(metric, real, other).values():
            assert figure.verdict == "tie", figure
            assert figure.interval[0] <= figure.value <= figure.interval[1]
    for name, metric in (("fd", "fd"), ("precision", "precision-recall"), ("density", "coverage")):
        assert figures(metric, real, noisy)[name].verdict == "worse"
    for name, metric in (("fd", "fd"), ("kid", "kid"), ("coverage", "coverage")):
        assert figures(metric, real, fewer)[name].verdict == "worse"
    assert figures("memorisation", real, fewer)["copies"].verdict == "tie"


@pytest.mark.slow
def test_copies_of_training_images_are_detected(digits):
    x, _ = digits
    real, held_out = x[:500], x[500:1000]
    copies = real[torch.randperm(500, generator=torch.Generator().manual_seed(1))] + 1e-4
    for others in (None, held_out):
        copied = figures("memorisation", real, copies, others)["copies"]
        assert copied.value == 1
        assert copied.note.startswith("these images are copies of the training images: 100%")
        few = torch.cat([copies[:100], x[1000:1400]])
        assert figures("memorisation", real, few, others)["copies"].verdict == "worse"
        better = figures("fd", real, copies, others)["fd"]
        assert better.verdict == "better"
        assert "are these copies?" in better.note


@pytest.mark.slow
def test_the_standard_error_matches_the_spread_over_samples():
    generator = torch.Generator().manual_seed(0)

    def draw(shift=0.0):
        return torch.randn(150, 8, generator=generator, dtype=torch.float64) + shift

    draws = [measure("fd", draw(), draw(0.5))[0] for _ in range(30)]
    spread = np.std([d.value for d in draws])
    error = np.sqrt(np.mean([d.standard_error**2 for d in draws]))
    # 30 samples of 20 halves each determine the ratio to 15 %; half-samples err on the wide side.
    assert 0.7 < error / spread < 1.8


def test_few_held_out_images_affect_the_floor_but_not_the_interval():
    generator = torch.Generator().manual_seed(0)
    real, drawn, held_out = (torch.randn(n, 8, generator=generator) for n in (400, 400, 40))
    few, many = (measure("fd", real, drawn, others)[0] for others in (held_out, None))
    assert few.floor_num_images == (200, 20)
    assert few.standard_error == pytest.approx(many.standard_error, rel=0.5)


@pytest.mark.slow
def test_the_interval_by_leading_directions_matches_that_by_all(monkeypatch):
    """For features with a decaying spectrum, as of networks; the floor keeps the full bias."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 61) ** -0.7

    def draw(num, shift=0.0):
        return torch.randn(num, 60, generator=generator) * scale + shift

    sets = draw(400), draw(300, 0.05), draw(350)
    (by_all,) = measure("fd", *sets)
    monkeypatch.setattr("ddpm_hf.evaluation.metrics._NUM_DIRECTIONS", 20)
    (by_some,) = measure("fd", *sets)
    assert by_some.value == by_all.value
    assert by_some.standard_error == pytest.approx(by_all.standard_error, rel=0.1)
    for kind in ("real", "drawn"):
        error = by_all.standard_error
        assert getattr(by_some.floor, kind) == pytest.approx(
            getattr(by_all.floor, kind), abs=error / 4
        )
    assert by_some.verdict == by_all.verdict == "worse"
