"""Extension of griffe: docstrings as the site's Markdown reads them, fields with the types of their annotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LITERAL = re.compile(r"(?<=\S)::$|^::\n\n", re.MULTILINE)
_COMPARISON = re.compile(r"^( +\w+: )>", re.MULTILINE)
_FIELDS = (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes)


def as_markdown(text: str) -> str:
    """`::` announces code in plain text, where Markdown needs no more than the indentation; "> 0" is no quotation."""
    text = _LITERAL.sub(lambda match: ":" if match[0] == "::" else "", text)
    return _COMPARISON.sub(r"\1\\>", text)


def annotate_fields(cls: griffe.Class) -> None:
    """A named tuple has no signature in its source to take the types of its fields from."""
    for section in cls.docstring.parsed if cls.docstring is not None else ():
        if section.kind not in _FIELDS:
            continue
        for field in section.value:
            member = cls.members.get(field.name)
            if field.annotation is None and member is not None and member.is_attribute:
                field.annotation = member.annotation


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        annotate_fields(cls)
