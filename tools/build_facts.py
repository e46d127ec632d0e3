"""Draw the built-in table of facts from EntityQuestions: python tools/build_facts.py

Run by hand, from the repository root, when the rules below change; the table it writes is part of the
repository and the same on every run. It needs the train part of EntityQuestions, one object
{"rel", "subj", "a"} a line, in ../shared/data/entity_questions.

A fact is kept when it can be learned but hardly guessed: its answer is one of thirty of the relation, none
of which has a large share, and its subject does not spell the answer. A subject that the source lists
twice in one relation names two things, and is left out.
"""

import argparse
import hashlib
import json
import lzma
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

SOURCE = "EntityQuestions train (princeton-nlp/EntityQuestions)"
LICENCE = "MIT"
RELATIONS = (
    *("P17", "P19", "P20", "P50", "P69", "P106", "P131", "P136"),
    *("P159", "P170", "P176", "P264", "P407", "P413", "P495", "P740"),
)
# Their answers are cities: the source also has countries there, which say something else about the subject.
CITY_RELATIONS = ("P19", "P20", "P159", "P740")
# Not of the relation's kind (a sport for a position, a company for an artist), a second name of another
# answer, or somebody's joke that was in Wikidata on the day of the crawl.
REFUSED_ANSWERS = {
    "P106": {"seiyū"},
    "P170": {"GMA Network", "Toei Company", "Tsuburaya Productions", "Viadinho historico"},
    "P176": {"Arman Ansari"},
    "P413": {
        *("kumite", "downhill mountain biking", "climbing specialist", "track cycling"),
        "individual time trial",
    },
}

NUM_KNOWN, NUM_NEW = 163, 75
NUM_ANSWERS = 30
MIN_KNOWN_PER_ANSWER = 3
ANSWER_SHARE = 0.10
MAX_SUBJECT, MAX_ANSWER, MAX_WORDS = 40, 30, 4
SHARED_LETTERS = 4

NAME = re.compile(r"[A-Za-z0-9\u00c0-\u024f'.&!-]+( [A-Za-z0-9\u00c0-\u024f'.&!-]+)*")


@dataclass(frozen=True)
class Triple:
    subject: str
    relation: str
    answers: tuple[str, ...]


def normalise(text: str) -> str:
    """Lower case without accents and punctuation: subjects equal after this are taken for the same one."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in letters if c.isalnum() or c.isspace() or c == "-").replace("-", " ")
    return " ".join(kept.split())


def is_clean(text: str, max_length: int) -> bool:
    """Whether `text` is a short name in Latin letters: no brackets, lists, quotes or bare numbers."""
    return 3 <= len(text) <= max_length and bool(NAME.fullmatch(text)) and any(c.isalpha() for c in text)


def spells(subject: str, answer: str) -> bool:
    """Whether the subject gives the answer away: one holds the other, or two of their words begin alike."""
    subject, answer = normalise(subject), normalise(answer)
    if answer in subject or subject in answer:
        return True
    return bool(beginnings(subject) & beginnings(answer))


def beginnings(text: str) -> set[str]:
    """The first letters of every word that is long enough to tell."""
    return {word[:SHARED_LETTERS] for word in text.split() if len(word) >= SHARED_LETTERS}


def rank(triple: Triple) -> tuple[bool, str]:
    """Order of preference: short subjects first, then an order that means nothing and never changes."""
    digest = hashlib.sha256(f"{triple.relation}|{triple.subject}".encode()).hexdigest()
    return len(triple.subject.split()) > MAX_WORDS, digest


def read_source(path: Path) -> dict[str, list[Triple]]:
    """Read every triple of the chosen relations, answers without repeats."""
    triples = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["rel"] in RELATIONS:
                answers = tuple(dict.fromkeys(record["a"]))
                triples[record["rel"]].append(Triple(record["subj"], record["rel"], answers))
    return triples


def usable(triples: list[Triple], refused_answers: set[str]) -> list[Triple]:
    """Keep the triples with clean names, one meaning, and an answer that the subject does not spell."""
    entries = Counter(normalise(triple.subject) for triple in triples)
    return [
        triple
        for triple in triples
        if entries[normalise(triple.subject)] == 1
        and is_clean(triple.subject, MAX_SUBJECT)
        and all(is_clean(answer, MAX_ANSWER) for answer in triple.answers)
        and not any(spells(triple.subject, answer) for answer in triple.answers)
        and not refused_answers.intersection(triple.answers)
    ]


def choose(triples: list[Triple], taken: set[str]) -> list[Triple]:
    """Take turns among the commonest answers until there are enough facts, so that none has a large share.

    Args:
        triples: usable triples of one relation.
        taken: normalised subjects that another relation has; the chosen ones are added.

    Returns:
        NUM_KNOWN + NUM_NEW triples, in the order in which they were taken.

    Raises:
        ValueError: the relation has too few facts within the largest share of an answer.
    """
    by_answer = defaultdict(list)
    for triple in sorted(triples, key=rank):
        if normalise(triple.subject) not in taken:
            by_answer[triple.answers[0]].append(triple)
    num_facts = NUM_KNOWN + NUM_NEW
    commonest = sorted(by_answer, key=lambda answer: (-len(by_answer[answer]), answer))[:NUM_ANSWERS]
    most = int(ANSWER_SHARE * num_facts)
    turns = zip_longest(*(by_answer[answer][:most] for answer in commonest))
    chosen = [triple for turn in turns for triple in turn if triple is not None][:num_facts]
    if len(chosen) < num_facts:
        raise ValueError(f"{triples[0].relation} gives {len(chosen)} facts, {num_facts} are needed")
    taken.update(normalise(triple.subject) for triple in chosen)
    return chosen


def split(chosen: list[Triple]) -> list[tuple[Triple, str]]:
    """Call every other further fact of an answer new, once enough known facts have the answer."""
    turns, num_new, labelled = Counter(), 0, []
    for triple in chosen:
        turn = turns[triple.answers[0]]
        turns[triple.answers[0]] += 1
        is_new = turn >= MIN_KNOWN_PER_ANSWER and (turn - MIN_KNOWN_PER_ANSWER) % 2 == 0 and num_new < NUM_NEW
        num_new += is_new
        labelled.append((triple, "new" if is_new else "known"))
    return labelled


def build(source: dict[str, list[Triple]]) -> list[dict]:
    """Choose and label the facts of every relation; the one with the least choice picks subjects first."""
    countries = {answer for triple in source["P17"] + source["P495"] for answer in triple.answers}
    refused = REFUSED_ANSWERS | dict.fromkeys(CITY_RELATIONS, countries)
    pools = {name: usable(source[name], refused.get(name, set())) for name in RELATIONS}
    taken, records = set(), []
    for relation in sorted(RELATIONS, key=lambda name: (len(pools[name]), name)):
        for triple, label in split(choose(pools[relation], taken)):
            fact = {"subject": triple.subject, "relation": relation, "answers": list(triple.answers)}
            records.append(fact | {"split": label, "source": SOURCE, "licence": LICENCE})
    return sorted(records, key=lambda record: hashlib.sha256(f"line {record['subject']}".encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("../shared/data/entity_questions/train.jsonl.xz"))
    parser.add_argument("--out", type=Path, default=Path("memlayer/data/facts/facts.jsonl"))
    arguments = parser.parse_args()
    records = build(read_source(arguments.source))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    arguments.out.write_text(lines, encoding="utf-8", newline="\n")
    print(f"{arguments.out}: {dict(Counter(record['split'] for record in records))}")


if __name__ == "__main__":
    main()
