"""Characters to token ids and back."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

PAD = 0
END = 1
FOREIGN = "αβγδεζηθ"  # the language that the cold-start data mixes in and the language reward unlearns

_CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " " + FOREIGN
_IDS = {character: index + 2 for index, character in enumerate(_CHARACTERS)}

SIZE = len(_CHARACTERS) + 2


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises ValueError for a character outside printable ASCII and `FOREIGN`."""
    try:
        return [_IDS[character] for character in text]
    except KeyError as error:
        raise ValueError(f"character {error.args[0]!r} is not in the vocabulary") from None


def decode(ids: Iterable[int]) -> str:
    """Text of the ids up to the first END; padding becomes nothing."""
    characters: list[str] = []
    for index in ids:
        if index == END:
            break
        if index != PAD:
            characters.append(_CHARACTERS[index - 2])
    return "".join(characters)


def pad_left(ids: Sequence[int], length: int) -> list[int]:
    """Prompts end at the same column, so that a batch decodes in step."""
    if len(ids) > length:
        raise ValueError(f"a text of {len(ids)} tokens does not fit in {length}")
    return [PAD] * (length - len(ids)) + list(ids)


def pad_right(ids: Sequence[int], length: int) -> list[int]:
    """Completions start at the same column."""
    if len(ids) > length:
        raise ValueError(f"a text of {len(ids)} tokens does not fit in {length}")
    return list(ids) + [PAD] * (length - len(ids))
