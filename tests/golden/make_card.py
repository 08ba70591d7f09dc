"""Update model_card.md of the project, and demo_card.json from the model folder of the demo.

Usage: python tests/golden/make_card.py [FOLDER]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from ddpm_hf.hub.card_facts import CardFacts, recorded_facts
from ddpm_hf.hub.card_rendering import render_model_card

FACTS = Path(__file__).with_name("demo_card.json")
CARD = Path(__file__).parents[2] / "model_card.md"


def facts() -> dict[str, Any]:
    """The recorded facts of the demo."""
    content: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return content


def render() -> str:
    """The card of the demo, with paths relative to the root of the project, without markers."""
    card = re.sub(r"<!--.*?-->\n", "", render_model_card(CardFacts.from_dict(facts())))
    card = re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"
    for text, at_root in (
        ("(samples.png)", "(docs/samples.png)"),
        ('"."', '"runs/demo/model"'),
        ("evaluate . ", "evaluate runs/demo/model "),
        ("in the folder of this checkpoint", "in the root of the project"),
    ):
        card = card.replace(text, at_root)
    return card


def main() -> None:
    if len(sys.argv) > 1:
        FACTS.write_text(json.dumps(recorded_facts(sys.argv[1]), indent=2) + "\n", encoding="utf-8")
    CARD.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
