"""Refusals shared by the dataclasses of a configuration."""

from typing import Any


def check_at_least(minimum: float, section: str, settings: Any, *names: str) -> None:
    """Raises: ValueError: one of the numbers named is below ``minimum``; None passes."""
    for name in names:
        if (number := getattr(settings, name)) is not None and number < minimum:
            raise ValueError(f"{section}.{name} is {number}, must be at least {minimum}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises: ValueError: ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be {' or '.join(map(repr, choices))}")
