"""All settings of a run in words, out of the dataclasses that hold them: what ``train.py --help`` shows."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin

from memlayer.jobs.config import ANY_RUN, RunConfig, TrainingRun
from memlayer.jobs.trainer_settings import FREE, OF_JOB
from memlayer.jobs.typed import members, name_of, section_of_each, typed_fields

WIDTH, COLUMN = 118, 40
ATTRIBUTE = re.compile(r"^    (\w+): (.*\n?(?:^ {8}.*\n?)*)", re.MULTILINE)


def describe_settings(job: str | None = None) -> str:
    """A line per setting with its default, its choices and what it is, grouped by job, section and method.

    Args:
        job: whose settings; None is all of them.
    """
    seen: set[str] = set()
    runs = [run for run in members(ANY_RUN) if job in (None, name_of(run))]
    trains = "every job that trains"
    groups = [_group("every job", RunConfig, "", None, seen)]
    if any(issubclass(run, TrainingRun) for run in runs):
        groups.append(_group(trains, TrainingRun, "", None, seen))
        groups.append(_names(f"{trains}, trainer.*", FREE))
    for run in runs:
        heading = f"job={name_of(run)}"
        groups.append(_group(heading, run, "", None, seen))
        if OF_JOB.get(name_of(run)):
            groups.append(_names(f"{heading}, trainer.*", OF_JOB[name_of(run)]))
        groups += _sections(heading, run, "", seen)
    return "\n\n".join(groups)


def _sections(heading: str, kind: type, prefix: str, seen: set[str]) -> list[str]:
    """The groups of the sections of a dataclass, and of theirs."""
    groups = []
    for field, hint in typed_fields(kind):
        default = None if field.default_factory is MISSING else field.default_factory()
        dotted = f"{prefix}{field.name}."
        if each := section_of_each(hint):
            groups.append(_group(f"{heading}, {dotted}NAME", each, f"{dotted}NAME.", None, seen))
        several = members(hint)
        for section in several:
            title = f"{heading}, {dotted[:-1]}"
            if len(several) > 1:
                usual = " (the default)" if type(default) is section else ""
                title += f".{dataclasses.fields(section)[0].name}={name_of(section)}{usual}"
            if f"{title} {section}" not in seen:  # of the several, all may have it
                groups.append(_group(title, section, dotted, default, seen))
                groups += _sections(heading, section, dotted, seen)
            seen.add(f"{title} {section}")
    return groups


def attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it inherits from say of each field."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            _, _, listed = inspect.cleandoc(each.__doc__).partition("Attributes:\n")
            found |= {name: " ".join(text.split()) for name, text in ATTRIBUTE.findall(listed)}
    return found


def _group(heading: str, kind: type, prefix: str, default: Any, seen: set[str]) -> str:
    """The settings of one dataclass; those that an earlier group shows with the same default are only named."""
    title = inspect.cleandoc(kind.__doc__).split("\n")[0].rstrip(".").replace("``", "")
    lines, again, docs = [f"{heading}: {title}"], [], attributes(kind)
    for field, hint in typed_fields(kind):
        if members(hint) or section_of_each(hint) or (get_origin(hint) is Literal and len(get_args(hint)) == 1):
            continue  # a section of its own, or the name in the heading
        value = getattr(default, field.name) if type(default) is kind else _default(field)
        line = _line(f"{prefix}{field.name}{_shown(value)}", docs[field.name].rstrip(".") + _choices(hint))
        if line not in seen:
            lines.append(line)
        elif prefix:
            again.append(prefix + field.name)
        seen.add(line)
    return "\n".join(lines + ([_wrapped(f"as above: {', '.join(again)}")] if again else []))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(default: Any) -> str:
    if default is MISSING:
        return " (required)"
    if isinstance(default, str):
        return f" = {json.dumps(default) if default != default.strip() or not default.isprintable() else default}"
    return f" = {'null' if default is None else str(default).lower() if isinstance(default, bool) else default}"


def _choices(hint: Any) -> str:
    return f" ({' | '.join(get_args(hint))})" if get_origin(hint) is Literal else ""


def _line(setting: str, doc: str) -> str:
    doc = doc.replace("``", "").replace("None ", "null ")
    lines = textwrap.wrap(doc, WIDTH - COLUMN)
    first = f"  {setting:<{COLUMN - 3}} {lines[0]}"
    return "\n".join([first, *(" " * COLUMN + line for line in lines[1:])])


def _names(heading: str, names: Iterable[str]) -> str:
    return f"{heading}, as in transformers.TrainingArguments:\n{_wrapped(', '.join(sorted(names)))}"


def _wrapped(words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
