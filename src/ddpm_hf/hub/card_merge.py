"""What a person wrote in a model card stays; what was generated is renewed around it.

Generated parts stand between comments that hold a hash of the content, so that a part which a
person changed can be told from one that nobody touched. The same goes for the keys of the metadata,
whose hashes stand in a hidden last line, with a hash of the card as it was written.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

_PART = re.compile(
    r"<!-- ddpm-hf (?P<name>\w+)(?: (?P<hash>\w+))? -->\n(?P<text>.*?)<!-- /ddpm-hf -->", re.S
)
_FRONT = re.compile(r"\A---\n(?P<yaml>.*?)^---\n", re.S | re.M)
_RECORD = re.compile(r"\n<!-- ddpm-hf-card (?P<card>\w+) (?P<keys>\{.*\}) -->\n")
_TOP_LEVEL_KEY = re.compile(r"^(?=[^\s#-][^\n]*?:)", re.M)


def sealed(text: str) -> str:
    """A freshly rendered card, with the hashes by which an edit is known later."""

    def seal(part: re.Match[str]) -> str:
        mark = f"<!-- ddpm-hf {part['name']} {_digest(part['text'])} -->"
        return f"{mark}\n{part['text']}<!-- /ddpm-hf -->"

    keys = {key: _digest(value) for key, value in _values(text).items()}
    return _with_record(_PART.sub(seal, text), keys)


def renewed(card: str | None, fresh: str) -> str:
    """`card` with all that nobody touched in it as it is in `fresh`, and the rest as it is.

    A generated part or key that a person removed stays away; one that was emptied comes back.

    Args:
        card: as it stands; a person may have written in it, or all of it.
        fresh: as it would be generated now, sealed.
    """
    if card is None:
        return fresh
    recorded = _recorded_keys(card)
    if recorded is None or not _PART.search(card.replace("\r\n", "\n")):
        return card  # all of it is a person's
    card = card.replace("\r\n", "\n")
    new = {part["name"]: part[0] for part in _PART.finditer(fresh)}

    def renew(part: re.Match[str]) -> str:
        is_ours = not part["text"].strip() or _digest(part["text"]) == part["hash"]
        return new.get(part["name"], part[0]) if is_ours else part[0]

    body = _FRONT.sub("", _RECORD.sub("\n", card), count=1)
    front = _renewed_front(card, fresh, recorded)
    return _with_record(front + _PART.sub(renew, body), _recorded_keys(fresh) or {})


def _renewed_front(card: str, fresh: str, recorded: dict[str, str]) -> str:
    mine, values, new = _entries(card), _values(card), _entries(fresh)
    untouched = {key for key in mine if recorded.get(key) == _digest(values.get(key))}
    entries = [new.get(key, "") if key in untouched else entry for key, entry in mine.items()]
    entries += [e for key, e in new.items() if key not in mine and key not in recorded]
    return f"---\n{''.join(entries)}---\n" if any(entries) else ""


@dataclass(frozen=True)
class Merged:
    """A card for the Hub.

    Attributes:
        text: what to upload.
        is_theirs: whether a person's words on the Hub were kept.
    """

    text: str
    is_theirs: bool = False


def merged(local: str | None, remote: str | None, fresh: str) -> Merged:
    """The card to upload, where a person may have written here, on the Hub, or in both places.

    Of different words those on the Hub win, unless they were uploaded from here.
    """
    ours, theirs = renewed(local, fresh), renewed(remote, fresh)
    differs = remote is not None and theirs not in (ours, fresh)
    if differs and (ours == fresh or not _is_as_uploaded(str(remote))):
        return Merged(theirs, is_theirs=True)
    # Though all of it be a person's, the record tells of an edit on the Hub.
    return Merged(ours if _RECORD.search(ours) else _with_record(ours, {}))


def with_metadata(card: str, key: str, value: str) -> str:
    """`card` with a key of its metadata set, as a person would set it."""
    entries = _entries(card) | {key: yaml.safe_dump({key: value}, allow_unicode=True)}
    body = _FRONT.sub("", _RECORD.sub("\n", card), count=1)
    text = f"---\n{''.join(entries.values())}---\n{body}"
    recorded = _recorded_keys(card)
    return text if recorded is None else _with_record(text, recorded)


def _with_record(text: str, keys: dict[str, str]) -> str:
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- ddpm-hf-card {_digest(text)} {json.dumps(keys)} -->\n"


def _recorded_keys(card: str) -> dict[str, str] | None:
    """Hashes of the metadata as it was generated; None where there is no record."""
    record = _RECORD.search(card.replace("\r\n", "\n"))
    try:
        keys: dict[str, str] | None = json.loads(record["keys"]) if record else None
    except ValueError:
        return None
    return keys


def _is_as_uploaded(card: str) -> bool:
    card = card.replace("\r\n", "\n")
    record = _RECORD.search(card)
    if record is None or card[record.end() :].strip():
        return False
    return _digest(card[: record.start()]) == record["card"]


def _digest(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, default=str, sort_keys=True)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def _entries(card: str) -> dict[str, str]:
    """The lines of the metadata by their key; comments belong to the key above them."""
    front = _FRONT.search(card)
    chunks = _TOP_LEVEL_KEY.split(front["yaml"]) if front else []
    return {chunk.split(":")[0].strip("'\" \n"): chunk for chunk in chunks if chunk}


def _values(card: str) -> dict[str, Any]:
    front = _FRONT.search(card)
    try:
        values = yaml.safe_load(front["yaml"]) if front else {}
    except (yaml.YAMLError, RecursionError):
        return {}  # a slip of the person's, which nothing here overwrites
    return values if isinstance(values, dict) else {}
