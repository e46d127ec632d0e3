"""Compare a generated answer with the answers that count, as strings.

What people write in several ways is one thing: case, Unicode forms (NFKC), invisible characters, thousands
separators, hyphens, the vowel points of Arabic and Hebrew, an article in front. What tells things apart stays:

- punctuation within a number, and its sign: 3.14 is not 314, -5 is not 5, but 29.00 is 29
- + and # behind a word, a minus that ends one of two letters, and other symbols: C++ is neither C# nor C, O- not O
- an article anywhere but in front: "Hepatitis A" is not "Hepatitis"
- a currency or per cent sign, where both answers have one: $100 is 100 and is not €100

Words are what white space parts; in Chinese, Japanese, Thai and other scripts without it each character is one.
The rule is kind to spelling and blind to meaning: an answer that is right but is not among the aliases scores zero.
squad.py has the rule of the papers.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})
APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bb\u02bc`\u00b4"), "'")
# What is written with it and without: vowel points of Arabic and Hebrew, Arabic's stretching line, and the marks
# that choose between a sign's black and coloured form.
POINTS = dict.fromkeys(
    [*range(0x064B, 0x0660), 0x0670, 0x0640, *range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, *range(0xFE00, 0xFE10)]
)
SUPERSCRIPT = re.compile("(?<=[0-9])(?=[\u00b2\u00b3\u00b9\u2070\u2074-\u2079])")
FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
# Scripts that part no words: Thai, Lao, Myanmar, Khmer, kana and Han.
WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF))
WITHOUT_SPACES += ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))

LONGEST_CHARGED = 2  # letters before a minus that tells things apart: O-, Rh-, Cl-
GROUPED = re.compile(r"(-?\d{1,3}(?:[,']\d{2,3})*[,']\d{3})(\.\d+)?")
DECIMAL = re.compile(r"-?\d+\.\d+")
FIRST_GROUP, NEXT_GROUP = re.compile(r"-?\d{1,3}"), re.compile(r"\d{3}(\.\d+)?")


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is the same as any of the answers.

    Raises:
        ValueError: ``answers`` is a single string, or empty.
    """
    _check(answers)
    return any(_same(prediction, answer) for answer in answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the closest answer, between 0 and 1.

    Raises:
        ValueError: ``answers`` is a single string, or empty.
    """
    _check(answers)
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


@lru_cache(maxsize=2**16)
def normalise(text: str) -> str:
    """The words of an answer in the form in which they are compared; normalising twice changes nothing more."""
    while (again := _normalised_once(text)) != text:
        text = again
    return text


def _same(prediction: str, answer: str) -> bool:
    if normalise(prediction) != normalise(answer):
        return False
    units = _split_units(_folded(prediction))[1], _split_units(_folded(answer))[1]
    return not all(units) or units[0] == units[1]


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _check(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of strings, not the single string {answers!r}")
    if not answers:
        raise ValueError("answers is empty, so no prediction could be right")


def _normalised_once(text: str) -> str:
    text, _ = _split_units(_folded(text))
    words = _without_articles(_join_groups([_canonical_number(word) for word in _words(text)]))
    return " ".join(words or text.split())


def _folded(text: str) -> str:
    """One character where Unicode has several for the same: case, width, dashes, apostrophes, digits."""
    text = FRACTION.sub(" ", SUPERSCRIPT.sub("^", text)).translate(APOSTROPHES)  # 7½ is not 71/2, 10⁶ not 106
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate(POINTS).replace("i\u0307", "i").replace("\u2044", "/")  # İ folds to two characters
    return "".join(map(_plain, text))


def _plain(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    return "-" if category == "Pd" or letter == "\u2212" else letter


def _split_units(text: str) -> tuple[str, frozenset[str]]:
    """The text without the currency and per cent signs of its numbers, and those signs."""
    units, kept = set(), []
    for number, letter in enumerate(text):
        before, after = text[:number].rstrip()[-1:], text[number + 1 :].lstrip()[:1]
        if (letter in "%\u2030" or unicodedata.category(letter) == "Sc") and (before.isdigit() or after.isdigit()):
            units.add(letter)
            kept.append("" if before == "-" else " ")
        else:
            kept.append(letter)
    return "".join(kept), frozenset(units)


def _words(text: str) -> list[str]:
    """Split into words, numbers with the punctuation within them, and symbols; other punctuation is dropped."""
    words = [""]
    for place, letter in enumerate(text):
        before, after = text[place - 1] if place else " ", text[place + 1 : place + 2] or " "
        number_follows = after.isdigit() or (after == "." and text[place + 2 : place + 3].isdigit())
        if _kind(letter) in "LMN":
            if _stands_alone(letter) or (_kind(letter) != "M" and _stands_alone(words[-1][:1] or " ")):
                words.append("")
            words[-1] += letter
        elif (letter in "+#" and words[-1]) or (before.isdigit() and after.isdigit() and _kind(letter) in "PS"):
            words[-1] += letter
        elif letter == "'" or (letter == "." and _kind(before) in "LM" and _kind(after) in "LM"):
            continue  # O'Brien is OBrien, U.S.A. is USA
        elif letter == "-" and number_follows and _kind(before) not in "LMN":
            words.append("-")
        elif letter == "-" and 0 < len(words[-1]) <= LONGEST_CHARGED and not text[place + 1 :].strip():
            words[-1] += letter
        elif letter == "." and after.isdigit() and words[-1] in ("", "-"):
            words[-1] += "0."
        elif _kind(letter) == "S" and not (letter == "+" and number_follows):
            words += [letter, ""]
        else:
            words.append("")
    return [word for word in words if word]


def _kind(letter: str) -> str:
    return unicodedata.category(letter)[0]


def _stands_alone(letter: str) -> bool:
    """Whether a letter is of a script that parts no words; its vowel marks are not, they belong to it."""
    return _kind(letter) != "M" and any(first <= ord(letter) <= last for first, last in WITHOUT_SPACES)


def _canonical_number(word: str) -> str:
    """1000 for 1,000 and 1'000, 29 for 29.00; any other word as it is."""
    if found := GROUPED.fullmatch(word):
        word = re.sub("[,']", "", found[1]) + (found[2] or "")
    return word.rstrip("0").rstrip(".") if DECIMAL.fullmatch(word) else word


def _join_groups(words: list[str]) -> list[str]:
    """Join the groups of a number whose thousands are parted by spaces."""
    joined: list[str] = []
    within = False
    for word in words:
        if joined and within and NEXT_GROUP.fullmatch(word):
            joined[-1] += word
        else:
            joined.append(word)
            within = bool(FIRST_GROUP.fullmatch(word))
        within = within and "." not in word
    return joined


def _without_articles(words: list[str]) -> list[str]:
    """Leave out articles in front of what is not one."""
    first = next((place for place, word in enumerate(words) if word not in ARTICLES), 0)
    return words[first:]
