"""Update of an existing model card: its generated sections and metadata are renewed.

A generated section stands between `<!-- ddpm-hf NAME -->` and `<!-- /ddpm-hf -->`. A card without
one is the user's own and stays unchanged.
"""

import re
import warnings

from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ddpm_hf.utils.bounded_yaml import check_yaml

_SECTION = re.compile(  # with a hash after the name in cards of older versions
    r"<!-- ddpm-hf (?P<name>\w+)(?: \w+)? -->(?P<newline>\r?\n)"
    r"(?:(?!<!-- ddpm-hf ).)*?<!-- /ddpm-hf -->",  # a section whose end was deleted stays
    re.DOTALL,
)
# Lines of older versions: a comment about edits, and hashes at the end.
_OBSOLETE = re.compile(
    r"<!-- What stands between marks such as the next is renewed with [^\n]* -->\r?\n"
    r"|\r?\n<!-- ddpm-hf-card \w+ \{[^\n]*\} -->\r?\n"
)
_GENERATED_METADATA = (
    "library_name", "pipeline_tag", "datasets", "base_model", "model_name", "eval_results",
)  # fmt: skip


def updated_card(card: str | None, generated: str) -> str:
    """`card` with the sections and metadata of `generated`.

    A deleted section stays deleted. Tags are united, and the licence is replaced only by another
    one. Invalid metadata stays unchanged, with a warning.

    Args:
        card: the current card; None if there is none.
        generated: a new card.
    """
    if card is None:
        return generated
    metadata, text = _split(card)
    if not _SECTION.search(text):
        return card
    new_metadata, new_text = _split(generated)
    sections = {section["name"]: section[0] for section in _SECTION.finditer(new_text)}

    def renew(section: re.Match[str]) -> str:
        new = sections.get(section["name"])
        return section[0] if new is None else new.replace("\n", section["newline"])

    text = _OBSOLETE.sub("", _SECTION.sub(renew, text))
    return _updated_metadata(metadata, metadata_of(new_metadata)) + text


def _updated_metadata(block: str, generated: CardData) -> str:
    try:
        data = metadata_of(block)
    except ValueError as error:
        warnings.warn(f"{error}; the metadata was left unchanged", stacklevel=2)
        return block
    for key in _GENERATED_METADATA:
        data[key] = generated.get(key)
    tags = data.get("tags", [])
    data["tags"] = [*tags, *(tag for tag in generated["tags"] if tag not in tags)]
    data["license"] = generated.get("license", data.get("license"))
    return _block(data, block)


def with_license(card: str, license: str) -> str:
    """`card` with this licence in its metadata.

    Raises:
        ValueError: if the metadata is invalid.
    """
    metadata, text = _split(card)
    data = metadata_of(metadata)
    data["license"] = license
    return _block(data, metadata) + text


def with_space(card: str, space_id: str) -> str:
    """`card` with a link to the Space that serves the model, after its introduction.

    The link is a section of its own, which later cards without a Space keep.
    """
    link = f"Try the model in the browser: [{space_id}](https://huggingface.co/spaces/{space_id})"
    section = f"<!-- ddpm-hf space -->\n{link}\n<!-- /ddpm-hf -->"
    metadata, text = _split(card)
    sections = {match["name"]: match for match in _SECTION.finditer(text)}
    if old := sections.get("space"):
        return metadata + text[: old.start()] + section + text[old.end() :]
    place = sections["intro"].end() if "intro" in sections else 0
    before, after = text[:place].rstrip(), text[place:].lstrip()
    return f"{metadata}{before}\n\n{section}\n\n{after}"


def metadata_of(card: str) -> CardData:
    """The metadata of a card.

    Raises:
        ValueError: if it is invalid.
    """
    block = _split(card)[0]
    if not block:
        return ModelCardData()
    try:
        check_yaml(block.strip().removeprefix("---").removesuffix("---"))
        return ModelCard(block).data
    except Exception as error:  # the parsers raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"README.md has metadata that the Hub would refuse: {reason}") from None


def _split(card: str) -> tuple[str, str]:
    """The YAML block with its fences, which may be empty, and the text."""
    match = REGEX_YAML_BLOCK.match(card)
    block = match[0] if match else ""
    return block, card[len(block) :]


def _block(data: CardData, previous: str) -> str:
    block = f"---\n{data.to_yaml()}\n---\n"
    return block.replace("\n", "\r\n") if "\r\n" in previous else block
