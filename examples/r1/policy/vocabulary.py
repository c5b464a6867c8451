"""Characters and tags to token ids and back."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

PAD = 0
END = 1
FOREIGN = "αβγδεζηθ"  # the language that the cold-start data mixes in and the language reward unlearns

TAGS = ("<t>", "</t>", "<a>", "</a>")  # a token each, like the tags of a real tokenizer
_SYMBOLS = (*string.digits, *string.ascii_lowercase, *",>", *FOREIGN, *TAGS)
_IDS = {symbol: index + 2 for index, symbol in enumerate(_SYMBOLS)}
_PIECES = re.compile("|".join(TAGS) + "|.", re.DOTALL)

SIZE = len(_SYMBOLS) + 2


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises ValueError for a character outside digits, lower-case letters, `,>` and `FOREIGN`."""
    try:
        return [_IDS[piece] for piece in _PIECES.findall(text)]
    except KeyError as error:
        raise ValueError(f"character {error.args[0]!r} is not in the vocabulary") from None


def decode(ids: Iterable[int]) -> str:
    """Text of the ids up to the first END; padding becomes nothing."""
    symbols: list[str] = []
    for index in ids:
        if index == END:
            break
        if index != PAD:
            symbols.append(_SYMBOLS[index - 2])
    return "".join(symbols)


def is_whole(ids: Sequence[int]) -> bool:
    """Whether the ids come to an END without padding on the way, which `decode` would not show."""
    return END in ids and PAD not in ids[: ids.index(END)]


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
