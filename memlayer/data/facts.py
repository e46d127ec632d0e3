"""Facts and the sentences that word them, read from files and checked before any training starts.

A facts file is JSON Lines, one (subject, relation, answers) object a line; a wordings file is one JSON
object from relation to statements and questions. All of a file is checked before any of it is returned: a
bad line found after an hour of training costs the hour. Turning facts into token ids is qa.py's job.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from memlayer.data.json_text import FactsError, check_keys, checked_text, json_or_none, parse_json, read_bytes

BUILTIN_FACTS = Path(str(files(__package__) / "facts" / "facts.jsonl"))
BUILTIN_WORDINGS = Path(str(files(__package__) / "facts" / "wordings.json"))

SPLITS = ("known", "new")
QUESTION_MARKS = ("?", "\uff1f", "\u061f")  # full width, Arabic
SHAPE = '{"subject": "Shop Ada", "relation": "city", "answers": ["Bonn"]}'
# Keys of the lines of public question sets: SQuAD, Natural Questions, TriviaQA, zsRE, CounterFact.
QUESTION_SET_KEYS = {"question", "Question", "data", "paragraphs", "qas", "src", "requested_rewrite"}
MAX_REFUSALS = 10
BUILTIN_NEW = 100  # new facts of the built-in table that are taught unless it is said how many
REQUIRED_KEYS = ("subject", "relation", "answers")
OPTIONAL_KEYS = ("split", "source", "licence")


@dataclass(frozen=True)
class Fact:
    """One thing to know.

    Args:
        subject: what the fact is about; stands for [X] in a wording.
        relation: id of the relation, a key of the wordings.
        answers: what is true; the first is taught (it stands for [Y]), any of them is scored as right.
        split: "known" when the model is pretrained on it, "new" when it never is.
        source: where the triple comes from.
        licence: under what licence it may be used.
    """

    subject: str
    relation: str
    answers: tuple[str, ...]
    split: str = "new"
    source: str = ""
    licence: str = ""

    @property
    def key(self) -> str:
        """Name of the fact, as messages and records give it."""
        return f"{self.relation}|{self.subject}"

    @property
    def identity(self) -> tuple[str, str]:
        """What two spellings of one fact share."""
        return self.relation, same_name(self.subject)


@dataclass(frozen=True)
class Wordings:
    """How one relation is put into words.

    The last statement and the last question are the unseen wordings: never taught for new facts.

    Args:
        name: the relation in a few plain words.
        statements: sentences holding [X] once and ending in [Y], so that leaving the answer out asks for it.
        questions: sentences holding [X] once and ending in a question mark: ?, full width or Arabic.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def seen_statements(self) -> tuple[str, ...]:
        return self.statements[:-1]

    @property
    def unseen_statement(self) -> str:
        return self.statements[-1]

    @property
    def seen_questions(self) -> tuple[str, ...]:
        return self.questions[:-1]

    @property
    def unseen_question(self) -> str:
        return self.questions[-1]


def same_name(text: str) -> str:
    """A name without what only spelling makes different: Unicode forms, case and how much white space.

    Lower case, not case folding, which would make one name of Maße and Masse.
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).split())


def load_facts(path: str | Path, wordings: Mapping[str, Wordings]) -> list[Fact]:
    """Read a JSON Lines file of facts, refusing it whole when any line is bad.

    Args:
        path: the file; keys subject, relation, answers are required, split, source, licence optional.
        wordings: relations that can be put into words, as `load_wordings` returns them.

    Returns:
        facts in the order of the file.

    Raises:
        FactsError: "FILE:LINE: reason", a line for each of the first ten bad lines, and how many more there are;
            "FILE: reason" for a file that is missing, holds nothing or is no JSON Lines file of facts.
    """
    data = read_bytes(path).rstrip()
    lines = data.split(b"\n")
    if lines == [b""]:
        raise FactsError(f"{path}: the file holds no facts")
    if other := _other_format(data, lines[0]):
        raise FactsError(f"{path}: {other}; a facts file is JSON Lines, one object a line, like {SHAPE}")
    facts, refusals, line_of_fact = [], [], {}
    for number, line in enumerate(lines, start=1):
        try:
            fact = _parse_fact(line, wordings)
            _refuse_repeat(fact, number, line_of_fact)
            facts.append(fact)
        except FactsError as error:
            refusals.append(f"{path}:{number}: {error}")
    if refusals:
        more = len(refusals) - MAX_REFUSALS
        also = f" (and {more} more bad {'line' if more == 1 else 'lines'})" if more > 0 else ""
        raise FactsError("\n".join(refusals[:MAX_REFUSALS]) + also)
    return facts


def _other_format(data: bytes, first_line: bytes) -> str:
    """What the file is where it is none of facts, a line each; nothing where it may be one."""
    whole, line = json_or_none(data), json_or_none(first_line)
    if isinstance(whole, list):
        record, found = (whole or [None])[0], "a JSON array (jq -c '.[]' FILE writes its members one a line)"
    elif isinstance(whole, dict) and line is None:
        record, found = whole, "one JSON object over several lines (jq -c . FILE writes it on one)"
    else:
        table = not first_line.lstrip().startswith((b"{", b"[")) and b"subject" in first_line.lower()
        record, found = line, "a table such as spreadsheets write, not JSON" if table else ""
    if isinstance(record, dict) and not record.keys() >= {"subject", "relation"} and QUESTION_SET_KEYS & record.keys():
        return "a question set, which is taught as it stands by lessons.files=[FILE]"
    return found


def load_wordings(path: str | Path) -> dict[str, Wordings]:
    """Read a JSON object from relation id to {"name", "statements", "questions"}.

    Raises:
        FactsError: the file is missing or is no such object, or a relation has fewer than two statements
            or two questions (one of each is kept unseen), a repeated one, or one with a placeholder out of
            place.
    """
    data = read_bytes(path)
    try:
        table = parse_json(data)
        if not isinstance(table, dict) or not table:
            raise FactsError("expected a JSON object with at least one relation")
        return {relation: _parse_wordings(relation, entry) for relation, entry in table.items()}
    except FactsError as error:
        raise FactsError(f"{path}: {error}") from None


def check_disjoint(known: Iterable[Fact], new: Iterable[Fact]) -> None:
    """Refuse new facts about subjects of known facts, whatever the case and whatever the relation.

    Raises:
        FactsError: names the first such subject and how many there are.
    """
    known_subjects = {same_name(fact.subject) for fact in known}
    shared = [fact for fact in new if same_name(fact.subject) in known_subjects]
    if shared:
        raise FactsError(f"new fact {shared[0].key!r} is about a known subject, one of {len(shared)} such facts")


def taught_anew(known: Iterable[Fact], new: Iterable[Fact]) -> list[Fact]:
    """The known facts that new ones are about too, of the same subject and relation: their answers are replaced."""
    identities = {fact.identity for fact in new}
    return [fact for fact in known if fact.identity in identities]


@dataclass
class Facts:
    """The facts of a run and the wordings they are told in."""

    known: list[Fact]
    new: list[Fact]
    wordings: dict[str, Wordings]


def facts_of(
    facts: str | Path | None = None,
    wordings: str | Path | None = None,
    num_known: int | None = None,
    num_new: int | None = None,
    first_new: int = 0,
) -> Facts:
    """Load and check the facts a run names; its ``data`` settings are these arguments.

    Raises:
        FactsError: a bad line, or a new fact about a known subject.
        ValueError: more facts asked for than there are.
    """
    paths = facts or BUILTIN_FACTS, wordings or BUILTIN_WORDINGS
    known, new, told = _splits(*paths, *map(read_bytes, paths))
    if num_new is None and facts is None:
        num_new = min(BUILTIN_NEW, len(new) - first_new)
    return Facts(_slice(known, 0, num_known, "known"), _slice(new, first_new, num_new, "new"), dict(told))


@lru_cache(maxsize=4)  # a run asks several times, and a comparison in each of its trials
def _splits(
    facts: str | Path, wordings: str | Path, _facts: bytes, _wordings: bytes
) -> tuple[tuple[Fact, ...], tuple[Fact, ...], Mapping[str, Wordings]]:
    """Known facts, new facts and wordings of two files; anew when the bytes in them have changed."""
    told = load_wordings(wordings)
    loaded = load_facts(facts, told)
    known, new = (tuple(fact for fact in loaded if fact.split == split) for split in SPLITS)
    check_disjoint(known, new)
    return known, new, told


def _slice(facts: Sequence[Fact], first: int, number: int | None, kind: str) -> list[Fact]:
    last = len(facts) if number is None else first + number
    if not 0 <= first <= last <= len(facts):
        raise ValueError(f"{kind} facts {first} to {last} asked for, the file has {len(facts)}")
    return list(facts[first:last])


def _parse_fact(line: bytes, wordings: Mapping[str, Wordings]) -> Fact:
    if not line.strip():
        raise FactsError("the line is empty")
    record = parse_json(line)
    if not isinstance(record, dict):
        raise FactsError(f"expected a JSON object, found {record!r:.60}")
    check_keys(record, REQUIRED_KEYS, OPTIONAL_KEYS)
    subject = checked_text("subject", record["subject"])
    relation = checked_text("relation", record["relation"])
    if relation not in wordings:
        raise FactsError(f"relation {relation!r} has no wordings; {', '.join(sorted(wordings))} have")
    answers = _checked_answers(record["answers"])
    split = record.get("split", "new")
    if split not in SPLITS:
        raise FactsError(f"split {split!r} is neither 'known' nor 'new'")
    source, licence = (_checked_optional(key, record.get(key, "")) for key in ("source", "licence"))
    return Fact(subject, relation, answers, split, source, licence)


def _checked_answers(answers: object) -> tuple[str, ...]:
    if not isinstance(answers, list) or not answers:
        raise FactsError(f"answers {answers!r:.60} is not a list of at least one string")
    return tuple(checked_text(f"answer {number}", answer) for number, answer in enumerate(answers, start=1))


def _checked_optional(name: str, value: object) -> str:
    return "" if value == "" else checked_text(name, value)


def _refuse_repeat(fact: Fact, number: int, line_of_fact: dict[tuple[str, str], int]) -> None:
    first = line_of_fact.setdefault(fact.identity, number)
    if first != number:
        raise FactsError(f"fact {fact.key!r} is already given on line {first}")


def _parse_wordings(relation: str, entry: object) -> Wordings:
    if not isinstance(entry, dict):
        raise FactsError(f"relation {relation!r}: expected a JSON object, found {entry!r:.60}")
    try:
        check_keys(entry, ("name", "statements", "questions"))
        name = checked_text("name", entry["name"])
        statements = _checked_sentences("statement", entry["statements"], endings=("[Y]",), num_objects=1)
        questions = _checked_sentences("question", entry["questions"], endings=QUESTION_MARKS, num_objects=0)
    except FactsError as error:
        raise FactsError(f"relation {relation!r}: {error}") from None
    return Wordings(name, statements, questions)


def _checked_sentences(kind: str, sentences: object, endings: tuple[str, ...], num_objects: int) -> tuple[str, ...]:
    if not isinstance(sentences, list) or len(sentences) < 2:
        raise FactsError(f"{kind}s {sentences!r:.60} is not a list of at least 2")
    for number, sentence in enumerate(sentences, start=1):
        where = f"{kind} {number} {sentence!r:.120}"
        if not isinstance(sentence, str):
            raise FactsError(f"{where} is not a string")
        if not sentence.endswith(endings):
            raise FactsError(f"{where} does not end with {' or '.join(endings)}")
        for placeholder, expected in (("[X]", 1), ("[Y]", num_objects)):
            if sentence.count(placeholder) != expected:
                found = sentence.count(placeholder)
                raise FactsError(f"{where} holds {placeholder} {found} times where {expected} is expected")
        if sentence in sentences[: number - 1]:
            raise FactsError(f"{where} repeats an earlier one, so nothing of it would be unseen")
    return tuple(sentences)
