"""Refresh demo_card.json and the project's model_card.md from the demo's model folder.

Usage: python tests/golden/make_card.py FOLDER
"""

import json
import re
import sys
from pathlib import Path

from ddpm_hf.hub.card import card_facts, render_model_card

FACTS = Path(__file__).with_name("demo_card.json")
CARD = Path(__file__).parents[2] / "model_card.md"


def render() -> str:
    """The card of the recorded demo, for a reader of this project: its paths are seen from here."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    card = re.sub(r"<!--.*?-->\n", "", render_model_card(facts))  # nobody renews this copy
    card = re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"
    return card.replace("(samples.png)", "(docs/samples.png)").replace('"."', '"runs/demo/model"')


def main() -> None:
    if len(sys.argv) > 1:
        FACTS.write_text(json.dumps(card_facts(sys.argv[1]), indent=2) + "\n", encoding="utf-8")
    CARD.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
