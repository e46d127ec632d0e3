"""Refusals shared by the dataclasses of a configuration."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_at_least(minimum: float, section: str, settings: Any, *names: str) -> None:
    """Raises: ValueError: one of the numbers named is below ``minimum``, or nan; None passes."""
    for name in names:
        if (number := getattr(settings, name)) is not None and not number >= minimum:
            raise ValueError(f"{_dotted(section, name)} is {number}, must be at least {minimum}")


def check_share(name: str, share: float, above_zero: bool = False) -> None:
    """Raises: ValueError: ``share`` is not at least 0 and below 1 or, with ``above_zero``, above 0 and at most 1."""
    if not (0 < share <= 1 if above_zero else 0 <= share < 1):
        bounds = "above 0 and at most 1" if above_zero else "at least 0 and below 1"
        raise ValueError(f"{name} is {share}, must be {bounds}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises: ValueError: ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be {' or '.join(map(repr, choices))}")


def check_choices(section: str, settings: Any) -> None:
    """Raises: ValueError: a field whose type is a Literal holds none of its choices."""
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        if get_origin(hints[field.name]) is Literal:
            check_choice(_dotted(section, field.name), getattr(settings, field.name), get_args(hints[field.name]))


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
