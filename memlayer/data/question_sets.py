"""Question sets and documents in the files people have, as records of a file of lessons (``lessons.py``).

A file is JSON Lines, JSON (an array, or SQuAD's and TriviaQA's one object), CSV, TSV, plain text or Markdown, packed by
xz or gzip or not, with or without a byte order mark. Of what set a record is, its keys say:

    question and answers under their many names   SQuAD, TriviaQA, NQ-open, PopQA, SimpleQA, EntityQuestions
    requested_rewrite; prompt with target_new      CounterFact, as published and as editing toolkits have it
    src with alt or answers                        zsRE
    fact with eval                                 WikiDYK
    text                                           a document

A dataset of the Hugging Face hub is read as such a file (``hub_sets.py``).
"""

import ast
import csv
import gzip
import io
import lzma
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from memlayer.data.hub_sets import local_file
from memlayer.data.json_text import FactsError, cleaned, json_or_none, parse_json, read_bytes

QUESTION_KEYS = ("question", "Question", "q", "problem", "query")
ANSWER_KEYS = ("answers", "answer", "Answer", "possible_answers", "a")
ID_KEYS = ("id", "question_id", "QuestionId", "case_id", "qid")
SUBJECT_KEYS = ("subject", "subj")
PARAPHRASE_KEYS = ("paraphrases", "rephrase", "paraphrase_prompts", "rephrase_prompt")
TEXT_FILES = (".txt", ".md")
CSV_FIELD_LIMIT = 1 << 24  # SimpleQA and PopQA keep whole lists in a field


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file and where each is.

    Raises:
        FactsError: the file cannot be read as what its name or its beginning says it is.
    """
    file = local_file(path)
    data = _unpacked(path, read_bytes(file))
    name = file.with_suffix("") if file.suffix in (".xz", ".gz") else file
    if name.suffix.lower() in TEXT_FILES:
        yield str(path), {"id": name.stem, "text": _decoded(path, data)}
        return
    if name.suffix.lower() in (".csv", ".tsv"):
        yield from _table(path, _decoded(path, data), "\t" if name.suffix.lower() == ".tsv" else ",")
        return
    lines = data.rstrip().split(b"\n")
    if len(lines) > 1 and json_or_none(lines[0]) is not None and not _is_whole(lines[0]):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(f"{path}:{number}", line)
        return
    whole = _parsed(str(path), data)
    if isinstance(whole, dict) and isinstance(inside := whole.get("data", whole.get("Data")), list):
        whole = [pair for record in inside for pair in _squad(record)]
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield f"{path}, record {number}", record


def _is_whole(line: bytes) -> bool:
    """Whether a first line is all of a JSON file: an array, or an object that holds one."""
    value = json_or_none(line)
    return isinstance(value, list) or (isinstance(value, dict) and isinstance(value.get("data"), list))


def _unpacked(path: Path, data: bytes) -> bytes:
    unpack = {".xz": lzma.decompress, ".gz": gzip.decompress}.get(path.suffix)
    if unpack is None:
        return data
    try:
        return unpack(data).removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise FactsError(f"{path}: the file is no whole {path.suffix} file ({error}): fetch it again") from None


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FactsError(f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None


def _parsed(place: str, data: bytes) -> Any:
    try:
        return parse_json(data)
    except FactsError as error:
        raise FactsError(f"{place}: {error}") from None


def _table(path: Path, text: str, separator: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise FactsError(f"{path}:{rows.line_num}: the row has not as many fields as the header")
            yield f"{path}:{rows.line_num}", row
    except csv.Error as error:
        raise FactsError(f"{path}:{rows.line_num}: {error}") from None


def _squad(record: Any) -> list[Any]:
    """The questions of an article of SQuAD, less those that its context does not answer; any other record itself."""
    if not isinstance(record, dict) or "paragraphs" not in record:
        return [record]
    asked = [pair for paragraph in record["paragraphs"] for pair in paragraph["qas"]]
    return [pair for pair in asked if not pair.get("is_impossible")]


def has_question(record: Mapping) -> bool:
    """Whether a record has a question under one of its names."""
    return any(key in record for key in QUESTION_KEYS)


def as_lesson(record: Mapping, place: str) -> dict:
    """A record of a question set as one of a file of lessons.

    What the set teaches is taught; its paraphrases are asked, unseen; without any, the question itself is asked, seen.

    Raises:
        FactsError: the record is of no known set, or has no answer.
    """
    name = cleaned(next((record[key] for key in ID_KEYS if record.get(key) not in (None, "")), place))
    if "requested_rewrite" in record:
        return _rewrite(record, name)
    if "target_new" in record and "prompt" in record:  # CounterFact as editing toolkits have it
        taught = {"prompt": record["prompt"], "answer": record["target_new"]}
        answers = _answers(record["target_new"])
        return _with_wordings(name, taught, answers, _paraphrases(record), _subject(record), updates=True)
    if "src" in record and ("alt" in record or "answers" in record):
        answers = _answers(record.get("alt") or record["answers"])
        taught = {"question": record["src"], "answer": answers[0]}
        return _with_wordings(name, taught, answers, _paraphrases(record), _subject(record))
    if "fact" in record and isinstance(record.get("eval"), Mapping):
        asked = [each for kind, each in record["eval"].items() if kind in ("reliability", "paraphrase", "generality")]
        ask = [{"question": cleaned(each["prompt"]), "answers": _answers(each["answer"])} for each in asked]
        return {"id": name, "teach": [{"text": record["fact"]}], "ask": ask}
    question = next((record[key] for key in QUESTION_KEYS if key in record), None)
    answers = next((record[key] for key in ANSWER_KEYS if key in record), None)
    if question is None or answers is None:
        if record.keys() >= {"subject", "relation", "answers"}:
            raise FactsError("a line of a facts file: name the file in data.facts, not in lessons.files")
        raise FactsError(
            f"neither a lesson, nor a document, nor of a question set known here: its keys are {', '.join(record)}"
        )
    answers = _answers(answers)
    if not answers:
        raise FactsError("the question has no answer")
    best = record["best"] if record.get("best") in answers else answers[0]
    taught = {"question": question, "answer": best}
    return _with_wordings(name, taught, answers, _paraphrases(record), _subject(record))


def _rewrite(record: Mapping, name: str) -> dict:
    edit = record["requested_rewrite"]
    new = edit["target_new"]["str"] if isinstance(edit["target_new"], Mapping) else edit["target_new"]
    taught = {"prompt": edit["prompt"].format(edit["subject"]), "answer": new}
    return _with_wordings(name, taught, _answers(new), _paraphrases(record), edit["subject"], updates=True)


def _subject(record: Mapping) -> str | None:
    """What a record says it is about, where it says so in a word or two."""
    found = next((record[key] for key in SUBJECT_KEYS if record.get(key)), None)
    return found if isinstance(found, str) else None


def _with_wordings(
    name: str,
    taught: dict[str, str],
    answers: list[str],
    paraphrases: list[str],
    subject: str | None = None,
    updates: bool = False,
) -> dict:
    kind = next(iter(taught))  # question or prompt
    taught = {key: cleaned(value) for key, value in taught.items()}
    ask = [{kind: taught[kind], "answers": answers, "wording": "seen"}]
    ask += [{kind: cleaned(other), "answers": answers, "wording": "unseen"} for other in paraphrases]
    named = subject and cleaned(subject).casefold() in taught[kind].casefold()
    about = {"subject": cleaned(subject)} if named else {}
    return {"id": name, "teach": [taught], "ask": ask, "updates": updates} | about


def _paraphrases(record: Mapping) -> list[str]:
    found = next((record[key] for key in PARAPHRASE_KEYS if record.get(key)), [])
    return [found] if isinstance(found, str) else list(found)


def _answers(value: Any) -> list[str]:
    """All answers that count, the one to teach first: of a list, a string, a list in a string, or an object."""
    if isinstance(value, Mapping):
        best = value.get("value", value.get("Value"))
        rest = value.get("text", value.get("aliases", value.get("Aliases", [])))
        return list(dict.fromkeys(_answers(([] if best is None else [best]) + list(rest))))
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)  # JSON, or Python's own, as spreadsheets of both kinds are about
    listed = value if isinstance(value, list) else [value]
    listed = [each["text"] if isinstance(each, Mapping) and "text" in each else each for each in listed]
    return list(dict.fromkeys(filter(None, map(cleaned, listed))))


def chunks(record: Mapping, place: str, words: int) -> Iterator[dict]:
    """A document as lessons of about so many words, cut between paragraphs, or between words of a longer one."""
    name = cleaned(next((record[key] for key in (*ID_KEYS, "title", "module") if record.get(key)), place))
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise FactsError(f"{place}: text {text!r:.60} is not a non-empty string")
    parts: list[str] = []
    for paragraph in filter(str.strip, text.replace("\r\n", "\n").split("\n\n")):
        pieces = _pieces(paragraph.strip(), words)
        if parts and len(parts[-1].split()) + len(pieces[0].split()) <= words:
            parts[-1] += "\n\n" + pieces.pop(0)
        parts += pieces
    for number, part in enumerate(parts, start=1):
        yield {"id": f"{name}, part {number} of {len(parts)}", "teach": [{"text": part}], "ask": []}


def _pieces(paragraph: str, words: int) -> list[str]:
    split = paragraph.split(" ")
    return [" ".join(split[first : first + words]) for first in range(0, len(split), words)]
