"""Objects named in a text: the 80 classes of COCO with CHAIR's synonyms, found word by word.

A text becomes lower-case words; at each place the longest known name wins ("hot dog" before "dog"), singular or
plural. The vocabulary is closed, so plurals are made from it by rule instead of guessing singulars of any word: about
1000 forms, and no word outside them is ever taken for an object. Words that look like objects and are not:

    baby bird, adult elephant   the animal, no person          (CHAIR, for its 12 words; here for every animal)
    passenger jet               the vehicle, no person         (CHAIR, for jet and train; here for every vehicle)
    toilet seat                 the toilet, no chair; and no seat is a chair where a toilet is named (CHAIR)
    train track                 nothing

Names with a hyphen count where the whole is a name (teddy-bear), so that "man-made" names nobody. As in CHAIR, words
are not read in context: an orange shirt is an orange.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
VEHICLES = ("car", "airplane", "bus", "train", "truck", "boat")

_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_IRREGULAR = {
    "person": ("people", "persons"),
    "child": ("children",),
    "grandchild": ("grandchildren",),
    "goose": ("geese",),
    "mouse": ("mice",),
    "ox": ("oxen",),
}
# Words of the file that are plurals already, or of which there is none.
_NO_PLURAL = ("people", "children", "cattle", "oxen", "scissors", "skis", "luggage")


# Words that cannot stand within a run of nouns: "man wearing a hat", "dog on a leash".
_NO_NOUN = re.compile(
    r"an?|the|and|or|of|on|in|at|by|for|from|to|with|without|near|under|over|above|below|behind|beside|between|around"
    r"|inside|outside|against|along|across|into|onto|through|towards?|upon|as|like|that|which|who|whose|is|are|his|her"
    r"|its|their|full|covered|made|filled|dressed|\w+ing"
)


@dataclass(frozen=True)
class Mention:
    word: str  # as the list of synonyms has it: singular, "hot dog"
    object: str  # its class


@dataclass(frozen=True)
class Vocabulary:
    classes: tuple[str, ...]
    forms: dict[tuple[str, ...], Mention | None]  # words in a row -> what they name; None: they name nothing
    longest: int  # words of the longest form

    def object_of(self, name: str) -> str | None:
        """The class that a class or synonym, singular or plural, belongs to."""
        mention = self.forms.get(tuple(words(name)))
        return mention.object if mention else None


@functools.cache
def vocabulary() -> Vocabulary:
    """The shipped list; see evaluation/data for its origin and licence."""
    text = (resources.files("mmrlhf") / "evaluation" / "data" / "chair_synonyms.txt").read_text(encoding="utf-8")
    rows = [[name.strip().lower() for name in line.split(",")] for line in text.splitlines() if line.strip()]
    forms: dict[tuple[str, ...], Mention | None] = {}

    def add(name: str, mention: Mention | None, prefix: str = "") -> None:
        *head, last = name.split()
        for form in (last, *plurals(last)):
            forms.setdefault((*prefix.split(), *head, form), mention)

    for names in rows:
        for name in names:
            add(name, Mention(name, names[0]))
    for names in rows:
        for name in names:
            if names[0] in ANIMALS:
                for young in ("baby", "adult"):
                    add(name, Mention(name, names[0]), young)
            if names[0] in VEHICLES:
                add(name, Mention(name, names[0]), "passenger")
    for name in ("animal", "cub"):
        for young in ("baby", "adult"):
            add(f"{young} {name}", None)
    add("toilet seat", Mention("toilet", "toilet"))
    add("train track", None)
    return Vocabulary(tuple(names[0] for names in rows), forms, max(map(len, forms)))


def plurals(word: str) -> tuple[str, ...]:
    """Plural forms of a singular noun. More than one where spelling wavers (buffalos, buffaloes): a form that nobody
    writes does no harm."""
    if word in _NO_PLURAL:
        return ()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man"):
        return (word[:-2] + "en", word + "s")  # policemen, dobermans
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (word + "es",)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return (word[:-1] + "ies",)
    if word.endswith("ff") or word.endswith("ffe"):
        return (word + "s",)
    if word.endswith("fe"):
        return (word[:-2] + "ves", word + "s")
    if word.endswith("f"):
        return (word[:-1] + "ves", word + "s")
    if word.endswith("o"):
        return (word + "s", word + "es")
    return (word + "s",)


def words(text: str) -> list[str]:
    """Lower-case words without possessive endings; hyphenated ones stay whole."""
    plain = text.lower().replace("’", "'").replace("‐", "-").replace("‑", "-")
    return [word.removesuffix("'s") for word in _WORD.findall(plain)]


def mentions(text: str) -> list[Mention]:
    """Every object that a text names, in order, repetitions included."""
    return _without_seats([mention for mention, _ in _found(words(text))])


def named(phrases: Iterable[str]) -> list[Mention]:
    """The objects that short noun phrases name: a table lamp is no table, a cup on a table is two objects.

    A name counts where it ends a run of nouns: at the end of a phrase, before a mark, or before a word that cannot
    belong to the same noun. Object HalBench's code takes such runs from a tagger, and looks up whole ones ("kitchen
    table" is none of its words); here a run is what its last word says.
    """
    found = []
    for piece in (piece for phrase in phrases for piece in re.split(r"[^\w\s'’‐‑-]+", phrase)):
        said = words(piece)
        for mention, end in _found(said):
            if end == len(said) or _NO_NOUN.fullmatch(said[end]):
                found.append(mention)
    return _without_seats(found)


def _found(said: Sequence[str]) -> Iterator[tuple[Mention, int]]:
    """Every name among these words, and the place behind it."""
    forms, longest = vocabulary().forms, vocabulary().longest
    at = 0
    while at < len(said):
        parts = tuple(said[at].split("-"))
        mention, width = None, 1
        if len(parts) > 1 and parts in forms:
            mention = forms[parts]
        else:
            for length in range(min(longest, len(said) - at), 0, -1):
                form = tuple(said[at : at + length])
                if form in forms:
                    mention, width = forms[form], length
                    break
        at += width
        if mention is not None:
            yield mention, at


def _without_seats(found: list[Mention]) -> list[Mention]:
    """No seat is a chair where a toilet is named."""
    toilet = any(mention.word == "toilet" for mention in found)
    return [mention for mention in found if not (toilet and mention.word == "seat")]
