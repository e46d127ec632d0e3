"""YAML and ``section.key=value`` with every value as it was written; what it is, its field decides (``typed.py``).

YAML tells by the look of a word what it is: 2026_11_27 is a number, 12:30 is 750, no is false. A folder may have
any of these names, so the text is kept.

Left out: merge keys, tags, and interpolation.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import yaml

NULLS = ("null", "Null", "NULL", "~")
NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?")  # where nothing says what a value is


@dataclass(frozen=True)
class Scalar:
    """A value as it was written.

    Attributes:
        text: its characters.
        quoted: it stood in quotes, so it is text and never null.
        override: it is what followed the = of an override, so it may hold a list or a mapping in brackets.
    """

    text: str
    quoted: bool = False
    override: bool = False

    @property
    def is_null(self) -> bool:
        """Whether it stands for nothing."""
        return not self.quoted and (self.text in NULLS or (not self.text and not self.override))

    def opened(self) -> "Scalar | list | dict":
        """The list or mapping that an override holds; itself where it holds none."""
        brackets = self.text[:1] + self.text[-1:]
        return parse(self.text) if self.override and brackets in ("[]", "{}") else self

    def plain(self) -> Any:
        """null, true, false, a number, or else the text: the value by its look."""
        if self.quoted or self.is_null:
            return self.text if self.quoted else None
        if self.text in ("true", "false"):
            return self.text == "true"
        if not NUMBER.fullmatch(self.text):
            return self.text
        return int(self.text) if self.text.lstrip("-+").isdigit() else float(self.text)


Tree = Scalar | list | dict


def parse(text: str) -> Tree:
    """Read YAML.

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    return {} if node is None else _tree(node)


def _tree(node: yaml.Node) -> Tree:
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return [_tree(each) for each in node.value]
    tree = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in tree:
            fault = "is there twice" if isinstance(key, yaml.ScalarNode) else "is no name"
            raise ValueError(f"the key {key.value!s:.40} {fault}, line {key.start_mark.line + 1}")
        tree[key.value] = _tree(value)
    return tree


def override(tree: dict, name: str, text: str) -> None:
    """Put a value under a dotted name, in place.

    Raises:
        ValueError: the name is that of a section, or on the way to it there is a value.
    """
    *sections, key = name.split(".")
    for depth, section in enumerate(sections, start=1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(sections[:depth])} is {shown(tree)}, so {name} cannot be set")
    if isinstance(tree.get(key), dict) and text[:1] + text[-1:] != "{}":  # a whole mapping may take another's place
        raise ValueError(f"{name} is a section: write {name}.key=value")
    tree[key] = Scalar(text, override=True)


def shown(tree: Tree) -> str:
    """A value in the words of a refusal."""
    if isinstance(tree, Scalar):
        return "null" if tree.is_null else repr(tree.text)
    return "a list" if isinstance(tree, list) else "a section"


def write(settings: Any) -> str:
    """A dataclass as YAML that ``typed.read`` makes the same dataclass of."""
    return yaml.dump(dataclasses.asdict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if Scalar(text).plain() is text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
