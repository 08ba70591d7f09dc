"""ImageFacts: JSON form and validation."""

import json

import pytest

from ddpm_hf.data import ImageFacts


@pytest.mark.parametrize(
    "facts",
    [
        ImageFacts("L", 28, 28),
        ImageFacts("RGBA", 64, 48, 16, ("a", "b")),
    ],
)
def test_facts_survive_conversion_to_json(facts):
    config = json.loads(json.dumps(facts.to_config()))
    assert config["format_version"] == 1
    assert set(config["image"]) == {"mode", "height", "width", "bit_depth"}
    assert ImageFacts.from_config(config) == facts


def test_the_classes_that_were_trained_survive_conversion_to_json():
    facts = ImageFacts("L", 8, 8, 8, ("a", "b", "c"), (3, 0, 1), has_null_class=False)
    again = ImageFacts.from_config(json.loads(json.dumps(facts.to_config())))
    assert (again.class_counts, again.has_null_class) == ((3, 0, 1), False)
    assert again.trained_classes == [0, 2]
    assert ImageFacts("L", 8, 8, 8, ("a", "b")).trained_classes == [0, 1]
    for counts in ([3, 0], [3, 0, -1], [3, 0, "1"], "300"):
        with pytest.raises(ValueError, match="`class_counts` must be one int for each"):
            ImageFacts.from_config({**facts.to_config(), "class_counts": counts})


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "CMYK"},
        {"height": 0},
        {"width": "28"},
        {"bit_depth": 12},
    ],
)
def test_invalid_facts_are_refused(change):
    config = ImageFacts("L", 28, 28).to_config()
    with pytest.raises(ValueError, match=next(iter(change))):
        ImageFacts.from_config({**config, "image": config["image"] | change})
    with pytest.raises(ValueError, match="`format_version` must be 1, got 2"):
        ImageFacts.from_config({**config, "format_version": 2})
