"""Read JSON and text that people wrote, refusing in one sentence what cannot be used."""

import json
import re
from pathlib import Path

# What nobody sees: soft hyphen, zero-width space, marks of direction, joiners of words, byte order mark. The two
# joiners that Persian, Indian scripts and emoji need are not among them.
INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode's categories Cc and Cs


class FactsError(ValueError):
    """A facts or wordings file holds what cannot be used; the message names the place and the value."""


def read_bytes(path: str | Path) -> bytes:
    """The file without the byte order mark that Windows writes in front."""
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise FactsError(f"{path}: the file cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FactsError(f"{path}: the file is UTF-16, as Windows writes it: save it as UTF-8")
    return data


def parse_json(data: bytes) -> object:
    """UTF-8 JSON in which no key is given twice."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except FactsError:
        raise
    except UnicodeDecodeError as error:
        raise FactsError(f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in data else ""
        raise FactsError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets thousands deep.
        raise FactsError(f"not usable JSON: {error}") from None


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise FactsError(f"key {repeated!r} is given twice")
    return table


def json_or_none(data: bytes) -> object:
    """The same, None where it is no such JSON."""
    try:
        return parse_json(data)
    except FactsError:
        return None


def check_keys(record: dict[str, object], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse a record that lacks a key or has one that nobody reads."""
    missing = [key for key in required if key not in record]
    if missing:
        raise FactsError(f"required key {missing[0]!r} is missing")
    unknown = sorted(set(record) - set(required) - set(optional))
    if unknown:
        raise FactsError(f"unknown key {unknown[0]!r}; the keys are {', '.join(required + optional)}")


def cleaned(value: object) -> str:
    """A value that others wrote as text for people: one line, without what nobody sees."""
    return " ".join(CONTROL.sub(" ", INVISIBLE.sub("", str(value))).split())


def text_for_people(name: str, value: object) -> str:
    """Return `value` if it is text that a person sees all of and a tokenizer reads back."""
    if not isinstance(value, str) or not value.strip():
        raise FactsError(f"{name} {value!r:.60} is not a non-empty string")
    if value != value.strip():
        raise FactsError(f"{name} {value!r:.60} starts or ends with white space")
    if CONTROL.search(value):
        raise FactsError(f"{name} {value!r:.60} holds a control character or half a surrogate pair")
    if found := INVISIBLE.search(value):
        raise FactsError(f"{name} {value!r:.60} holds U+{ord(found[0]):04X}, which nobody sees: delete it")
    return value


def checked_text(name: str, value: object) -> str:
    """The same, if a wording can hold it: without a placeholder."""
    value = text_for_people(name, value)
    if "[X]" in value or "[Y]" in value:
        raise FactsError(f"{name} {value!r:.60} holds a placeholder of the wordings, [X] or [Y]")
    return value
