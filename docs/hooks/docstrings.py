"""Extension of griffe: docstrings as the site's Markdown reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LITERAL = re.compile(r"(?<=\S)::$|^::\n\n", re.MULTILINE)
_COMPARISON = re.compile(r"^( +\w+: )>", re.MULTILINE)


def as_markdown(text: str) -> str:
    """`::` announces code in plain text, where Markdown needs no more than the indentation; "> 0" is no quotation."""
    text = _LITERAL.sub(lambda match: ":" if match[0] == "::" else "", text)
    return _COMPARISON.sub(r"\1\\>", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
