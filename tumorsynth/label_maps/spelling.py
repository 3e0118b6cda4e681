"""Compare names of organs, however they are spelt.

A name is the set of its words: in lower case, without separators, with capital letters inside a
name as the beginnings of words, and with l and r at either end as left and right. "Left-Kidney",
"kidney_l", "KidneyLeft" and "Kidney (left)" are one name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tumorsynth.arguments import suggestion

SIDES = {"left", "right"}
PARTS = SIDES | {"upper", "middle", "lower", "lobe"}  # words that a group of structures leaves out
SIDE_WORDS = {"l": "left", "lt": "left", "r": "right", "rt": "right"}  # at either end of a name
TUMOR_NAME = re.compile(r"tumou?r|lesion|cancer|carcinoma|metasta|nodule|neoplas", re.I)
SUBSTRUCTURE = re.compile(rf"{TUMOR_NAME.pattern}|cyst", re.I)  # of an organ, and not all of it
CAPITALS = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # of camel case
MAX_LISTED = 30  # names of a map, in a message
SYNONYMS = [  # (pattern, word) for the words of a name, in lower case with single spaces
    (r"\bgallbladder\b", "gall bladder"),
    (r"\burinary bladder\b", "bladder"),
    (r"\b(postcava|ivc)\b", "inferior vena cava"),
    (r"\boesophagus\b", "esophagus"),
    (r"\barota\b", "aorta"),  # the spelling of AMOS
    (r"\btumours?\b", "tumor"),
    (r"\badrenals?\b(?! gland)", "adrenal gland"),
    (r"\blarge bowel\b", "colon"),
    (r"\brenal\b", "kidney"),
    (r"\bhepatic\b", "liver"),
    (r"\bpulmonary\b", "lung"),
]

Words = frozenset[str]


class Matching(NamedTuple):
    """The names that a structure has.

    Args:
        names: of it, or of the structures of a group; none if it is unknown.
        is_one: whether they are spellings of one structure.
        other_side: names that may belong to the group, where all that surely do are of one side.
    """

    names: tuple[str, ...] = ()
    is_one: bool = True
    other_side: tuple[str, ...] = ()


def matching_names(name: str, known: Iterable[str]) -> Matching:
    """Return the names that are a structure, or that belong to a group.

    Args:
        name: what the user wrote.
        known: the names that there are.
    """
    names = list(known)
    if not _split(name):
        return Matching()
    ways: list[Callable[[str], Words]] = [_plain_words, _words, _singular_words]
    for words in ways:
        if exact := [one for one in names if words(one) == words(name)]:
            return Matching(tuple(exact))
    wanted = _singular_words(name)
    if wanted <= PARTS:
        return Matching()
    beyond = {one: _singular_words(one) - wanted for one in names if wanted < _singular_words(one)}
    parts = [one for one in beyond if beyond[one] <= PARTS]
    return Matching(tuple(parts), False, tuple(_other_side(wanted, parts, names)))


def _other_side(wanted: Words, found: list[str], names: list[str]) -> list[str]:
    """Return names that hold a group's words in a spelling of their own, where a side is missing.

    Args:
        wanted: words of the group.
        found: the names that belong to it.
        names: all names.
    """
    sides = SIDES & {word for one in found for word in _words(one)}
    if len(sides) != 1:
        return []
    return [
        one
        for one in names
        if one not in found
        and all(word in " ".join(_words(one)) for word in wanted)
        and not (sides <= _words(one) or SUBSTRUCTURE.search(one))
    ]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown name."""
    names = [one for one in known if one.lower() != "background"]
    near = suggestion([name], names)
    wanted = [word for word in _words(name) - PARTS if len(word) > 2]
    holding = [one for one in names if any(word in one.lower() for word in wanted)]
    if not near and holding:
        near = f"did you mean {' or '.join(holding[:5])}? "
    listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return f"{near}it has {listed or 'none'}"


def _split(name: str) -> list[str]:
    words = re.findall(r"[^\W_]+", CAPITALS.sub(" ", name).lower())
    if len(words) > 1:
        for end in (0, -1):
            words[end] = SIDE_WORDS.get(words[end], words[end])
    return words


def _plain_words(name: str) -> Words:
    return frozenset(_split(name))


def _words(name: str) -> Words:
    """The words with synonyms replaced."""
    text = " ".join(_split(name))
    for pattern, word in SYNONYMS:
        text = re.sub(pattern, word, text)
    return frozenset(text.split())


def _singular_words(name: str) -> Words:
    """The words without the s of a plural: kidneys, kidney."""
    return frozenset(word.removesuffix("s") for word in _words(name))
