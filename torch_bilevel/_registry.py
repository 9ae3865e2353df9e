"""Names with options: ``"cg"``, ``"cg(max_steps=20, rtol=1e-3)"``.

A string is a name or a call with literal keyword arguments; it stands for a frozen dataclass
whose class carries the name in ``name``. `describe` gives the string back.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UnknownName


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names."""
    known = sorted(known)
    close = difflib.get_close_matches(word.lower(), known, n=2, cutoff=0.5)
    meant = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{meant}Known: {', '.join(known)}."


def parse(
    text: str,
    known: Mapping[str, Any],
    kind: str,
    example: str = "cg(max_steps=20, rtol=1e-3)",
) -> tuple[str, dict[str, Any]]:
    """Split ``"name(option=value)"`` into the name and its options.

    Raises:
        UnknownName: the text is not of that form, or the name is not in ``known``.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            name, options = node.id, {}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.args:
                raise ValueError("options are written name=value")
            name = node.func.id
            options = {str(k.arg): _literal(k) for k in node.keywords}
        else:
            raise ValueError("neither a name nor a call")
    except (SyntaxError, ValueError) as error:
        raise UnknownName(
            f"Cannot read the {kind} {text!r} ({error}). Write a name or a name with "
            f"literal options, such as {example!r}."
        ) from None
    if name not in known:
        raise UnknownName(f"There is no {kind} named {name!r}. {suggest(name, known)}")
    return name, options


def _literal(keyword: ast.keyword) -> Any:
    try:
        return ast.literal_eval(keyword.value)
    except ValueError:
        written = ast.unparse(keyword.value)
        raise ValueError(f"{written} is not a literal; give an object for it") from None


def build(cls: type, options: Mapping[str, Any], written: str) -> Any:
    """An instance of a dataclass, with a readable error for options it lacks.

    Raises:
        UnknownName: an option that ``cls`` does not have, or one it needs and was not given.
    """
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    for option in options:
        if option not in fields:
            raise UnknownName(
                f"{written!r} has no option {option!r}. {suggest(option, fields)}"
            )
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if field.init and needed and field.name not in options:
            raise UnknownName(
                f"{written!r} needs the option {field.name!r}: write "
                f"'{written}({field.name}=...)'."
            )
    return cls(**options)


def changed(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from their defaults."""
    return {
        field.name: getattr(instance, field.name)
        for field in dataclasses.fields(instance)
        if getattr(instance, field.name) != field.default
    }


def describe(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of `parse`."""
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name
