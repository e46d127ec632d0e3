"""Make dataclasses of what was written: the type of a field decides what its text means.

A field of text gets the text, a number is what Python takes for one, one value is a list of one. Where one of several
dataclasses may stand, the first field of each is a Literal with its name, and that name decides; a setting that only
another of them has is refused with both names.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from memlayer.jobs.written import Scalar, Tree, shown

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


class UnknownSetting(ValueError):
    """A dotted name that no field has."""


def read(kind: Any, tree: Tree) -> Any:
    """A dataclass, or one of several, out of what was written.

    Raises:
        ValueError: a name that no field has, a value of another type, a required one left out, or what the
            dataclass itself refuses.
    """
    try:
        return _read(kind, tree, "")
    except UnknownSetting as unknown:
        (name,) = unknown.args
        near = _nearest(name, list(dict.fromkeys(names(_chosen(members(kind), tree, "", None)))))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name} is not a setting{hint}") from None


def names(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings of a dataclass, or of several."""
    for member in members(kind):
        for field, hint in typed_fields(member):
            if members(hint):
                yield from names(hint, f"{prefix}{field.name}.")
            elif item := section_of_each(hint):
                yield from names(item, f"{prefix}{field.name}.NAME.")
            else:
                yield prefix + field.name
                yield from (f"{prefix}{field.name}.{key}" for key in field.metadata.get("types", ()))


def members(kind: Any) -> list[type]:
    """The dataclasses that a type allows, none for the type of a single value."""
    kinds = get_args(kind) if _is_union(kind) else (kind,)
    return [each for each in kinds if dataclasses.is_dataclass(each)]


def section_of_each(kind: Any) -> type | None:
    """The dataclass that each of the sections of a mapping is, where it is one of sections under names of one's own."""
    _, *items = get_args(kind) if get_origin(kind) is dict else (None,)
    return items[0] if items and members(items[0]) else None


def typed_fields(member: type) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of a dataclass with their types."""
    hints = get_type_hints(member)
    return [(field, hints[field.name]) for field in dataclasses.fields(member)]


def name_of(member: type) -> str | None:
    """The name of one of several dataclasses: the only value of its first field."""
    _, first = typed_fields(member)[0]
    return get_args(first)[0] if get_origin(first) is Literal else None


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _read(kind: Any, tree: Tree, name: str, default: Any = None) -> Any:
    several = members(kind)
    if not several:
        return _value(kind, tree, name)
    tree = _as_section(tree, name)
    chosen = _chosen(several, tree, name, default)
    _check_names(chosen, several, tree, name)
    return _section(chosen, tree, name, default if type(default) is chosen else None)


def _chosen(several: list[type], tree: dict, name: str, default: Any) -> type:
    """Which of the dataclasses was written."""
    if len(several) == 1:
        return several[0]
    key, by_name = dataclasses.fields(several[0])[0].name, {name_of(each): each for each in several}
    if key not in tree and default is not None:
        return type(default)
    said = f"is {shown(tree[key])}" if key in tree else "is not set"
    if key not in tree or getattr(tree[key], "text", None) not in by_name:
        raise ValueError(f"{_dotted(name, key)} {said}, must be {' or '.join(map(repr, by_name))}")
    return by_name[tree[key].text]


def _check_names(chosen: type, several: list[type], tree: dict, name: str) -> None:
    def has(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    for key in tree.keys() - has(chosen):
        dotted, others = _dotted(name, key), [name_of(each) for each in several if key in has(each)]
        if others:
            *first, last = others
            some = f"{', '.join(first)} and {last}" if first else last
            raise ValueError(f"{dotted} is a setting of {some}, not of {name_of(chosen)}")
        raise UnknownSetting(dotted)


def _section(kind: type, tree: dict, name: str, default: Any) -> Any:
    """The dataclass, what is not written being as in ``default`` or else as in the dataclass."""
    values = {}
    for field, hint in typed_fields(kind):
        dotted = _dotted(name, field.name)
        ours = _default(field) if default is None else getattr(default, field.name)
        if "types" in field.metadata:
            values[field.name] = _open_section(field.metadata["types"], tree.get(field.name, {}), dotted)
        elif field.name in tree and (item := section_of_each(hint)):
            tree_of = _as_section(tree[field.name], dotted)
            values[field.name] = {key: _read(item, each, _dotted(dotted, key)) for key, each in tree_of.items()}
        elif field.name in tree and ours is None and _is_null(tree[field.name]):
            values[field.name] = None
        elif field.name in tree or (members(hint) and ours is not None):
            values[field.name] = _read(hint, tree.get(field.name, {}), dotted, None if ours is MISSING else ours)
        elif ours is MISSING:
            raise ValueError(f"{dotted} is not set")
        else:
            values[field.name] = ours
    return kind(**values)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _open_section(types: dict[str, Any], tree: Tree, name: str) -> dict[str, Any]:
    """A section whose names are somebody else's; ``types`` are those of the names that are known."""
    tree = _as_section(tree, name)
    return {key: _value(types.get(key, Any), value, _dotted(name, key)) for key, value in tree.items()}


def _as_section(tree: Tree, name: str) -> dict:
    if _is_null(tree):  # a heading of YAML with nothing under it
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is {shown(tree)}, must be a section of key: value")
    return tree


def _value(kind: Any, tree: Tree, name: str) -> Any:
    """A value, a list or a mapping, of the type."""
    origin = get_origin(kind) or kind
    if _is_union(kind):
        return _one_of(get_args(kind), tree, name)
    if origin is list:
        return _list(kind, tree, name)
    if origin is dict:
        opened = _opened(tree, name)
        if isinstance(opened, dict):
            return _by_look(opened, name)
    elif kind is type(None):
        if isinstance(tree, Scalar) and tree.is_null:
            return None
    elif origin is Literal:
        if isinstance(tree, Scalar) and tree.text in get_args(kind):
            return tree.text
    elif kind not in WORDS:
        return _by_look(tree, name)
    elif isinstance(tree, Scalar) and not tree.is_null:
        return _of_text(kind, tree.text, name)
    raise ValueError(f"{name} is {shown(tree)}, must be {_words(kind)}")


def _one_of(kinds: tuple, tree: Tree, name: str) -> Any:
    """The first type that takes the value; text takes every word, so it comes last."""
    first = [kind for kind in kinds if _is_known(kind) and kind is not str]
    for kind in first:
        if get_origin(kind) is list and str in kinds and isinstance(_opened(tree, name), Scalar):
            continue  # one word is text where a list may stand too
        try:
            return _value(kind, tree, name)
        except ValueError:
            if set(first) - {type(None)} == {kind} and str not in kinds and not _is_null(tree):
                raise  # its sentence is better than "a number or null"
    if str in kinds or not first:
        return _value(str if str in kinds else Any, tree, name)
    raise ValueError(f"{name} is {shown(tree)}, must be {' or '.join(map(_words, first))}")


def _is_known(kind: Any) -> bool:
    return kind in WORDS or kind is type(None) or (get_origin(kind) or kind) in (list, dict, Literal)


def _is_null(tree: Tree) -> bool:
    return isinstance(tree, Scalar) and tree.is_null


def _list(kind: Any, tree: Tree, name: str) -> list:
    if _is_null(tree) or isinstance(tree, dict):
        raise ValueError(f"{name} is {shown(tree)}, must be a list")
    opened = _opened(tree, name)
    items = opened if isinstance(opened, list) else [tree]
    (item,) = get_args(kind)
    return [_value(item, each, f"{name}[{i}]") for i, each in enumerate(items)]


def _of_text(kind: type, text: str, name: str) -> Any:
    if kind is str:
        if not text:
            raise ValueError(f"{name} is empty")
        return os.path.expanduser(text)
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}, must be {_words(kind)}")
    return value


def _by_look(tree: Tree, name: str) -> Any:
    """A value whose type nobody knows."""
    tree = _opened(tree, name)
    if isinstance(tree, Scalar):
        return tree.plain()
    if isinstance(tree, list):
        return [_by_look(each, name) for each in tree]
    return {key: _by_look(value, name) for key, value in tree.items()}


def _opened(tree: Tree, name: str) -> Tree:
    """The list or mapping that an override holds; anything else as it is."""
    try:
        return tree.opened() if isinstance(tree, Scalar) else tree
    except ValueError as error:
        words = "in brackets but not YAML; put its items in quotes"
        raise ValueError(f"{name} is {tree.text!r}, {words}") from error


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return "null" if kind is type(None) else WORDS.get(get_origin(kind) or kind, "a mapping")


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _nearest(name: str, known: list[str]) -> list[str]:
    """Settings that may be meant: those with the same last word, else those with a like name."""
    last, words = name.rpartition(".")[2], {each.rpartition(".")[2]: each for each in known}
    same = [each for each in known if each.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return same or alike or [words[word] for word in difflib.get_close_matches(last, words, n=1, cutoff=0.75)]
