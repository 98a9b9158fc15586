"""Object HalBench: objects that a description names and the picture does not hold (CHAIR, Rohrbach et al. 2018).

Reference: eval/eval_gpt_obj_halbench.py of RLAIF-V (83d917b). Published `chair_s` is its CHAIRs_refine: the share of
descriptions that hallucinate among those that name an object of COCO at all; `chair_i` is the share of hallucinated objects.

How a description becomes COCO objects:
1. a judge lists the objects that it names (of three words or fewer: none);
2. each name is tagged and lemmatized; pairs of words that COCO knows ("wine glass") win over single nouns;
3. synonyms become the name of their COCO object; each word counts once, and "seat" beside "toilet" not at all.

Step 2 is made with spaCy's en_core_web_trf in the reference. That model is on no package index, so it is used only where
it is installed and asked for ([`spacy_tagger`]). [`plain_tagger`] does without: it knows plurals and the words that are no
nouns in such lists. Step 1 needs a judge, and gpt-3.5-turbo-0613, which the reference asks, is no longer served.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from minicpmv.errors import MiniCPMVError, require
from minicpmv.evaluate.benchmark import Entry, Judge, Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.choice import is_undecided, scored_text


SHORT_ANSWER = 3  # words; up to here an answer names nothing
SPACY_MODEL = "en_core_web_trf"
ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)


class MissingTaggerError(MiniCPMVError):
    """The model of spaCy that tags words is not there."""


Tagger = Callable[[str], list[tuple[str, bool]]]  # a text -> its words: (lemma, whether it is a noun)


@cache
def coco_names() -> dict[str, str]:
    """Every word for a COCO object, and the object's name (the table of synonyms of RLHF-V, after Rohrbach's)."""
    table = json.loads(Path(__file__).with_name("coco_objects.json").read_text(encoding="utf-8"))
    return {word: name for name, synonyms in table.items() for word in (name, *synonyms)}


@cache
def pairs_of_words() -> dict[str, str]:
    """Two words that name one thing, and what stands for them."""
    pairs = {word: word for word in (*coco_names(), "home plate", "train track") if " " in word}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def words_of(names: Iterable[str], tagger: Tagger) -> list[str]:
    """Listed objects as words, each once: pairs that are known, or else runs of nouns."""
    words: list[str] = []
    for name in names:
        tokens = tagger(f"a {name}")
        words += _pairs_in([lemma for lemma, _ in tokens]) or _runs_of_nouns(tokens)
    return list(dict.fromkeys(words))


def _pairs_in(lemmas: Sequence[str]) -> list[str]:
    found, place = [], 0
    while place < len(lemmas):
        pair = " ".join(lemmas[place : place + 2])
        if pair in pairs_of_words():
            found.append(pairs_of_words()[pair])
            place += 1
        place += 1
    return found


def _runs_of_nouns(tokens: Sequence[tuple[str, bool]]) -> list[str]:
    runs: list[list[str]] = [[]]
    for lemma, is_noun in tokens:
        if is_noun:
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def coco_objects(words: Sequence[str]) -> list[str]:
    """The COCO object that each word names; words that name none are left out."""
    beside_toilet = "toilet" in words
    return [coco_names()[word] for word in words if word in coco_names() and not (beside_toilet and word == "seat")]


def objects_in_image(categories: Iterable[str], captions: Iterable[str], tagger: Tagger | None = None) -> list[str]:
    """What an image holds: COCO's annotated categories, and the objects in the captions that people wrote."""
    found = {coco_names()[category] for category in categories}
    for caption in captions:
        lemmas = [lemma for lemma, _ in (tagger or plain_tagger)(caption.lower())]
        words, place = [], 0
        while place < len(lemmas):
            pair = " ".join(lemmas[place : place + 2])
            words.append(pairs_of_words().get(pair, lemmas[place]))
            place += 2 if pair in pairs_of_words() else 1
        found.update(coco_objects(words))
    return sorted(found)


def count_hallucinated(words: Sequence[str], objects: Iterable[str]) -> Scores:
    """Scores of a description by the words it names and the COCO objects that the image holds."""
    there, named = set(objects), coco_objects(list(dict.fromkeys(words)))
    hallucinated = [name for name in named if name not in there]
    return {
        "exact": float(not hallucinated) if named else None,
        "named": float(len(named)),
        "hallucinated": float(len(hallucinated)),
        "extracted": named,
        "undecided": False,
    }


def objhal(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """A short description names nothing; any other is for the judge.

    Args:
        expected: `objects`, the COCO objects that the image holds ([`objects_in_image`]); `question` is for the judge.
    """
    if len(answer.split()) <= SHORT_ANSWER:
        return count_hallucinated([], expected["objects"])
    return {"exact": None, "named": 0.0, "hallucinated": 0.0, "extracted": None, "undecided": True}


def chair(scores: list[Scores]) -> Metrics:
    """`chair_s` among descriptions that name an object, `chair_i` among named objects; `chair_s_all` among all
    descriptions. None where none is named."""
    known = [score for score in scores if not score["undecided"]]
    naming = [score for score in known if score["named"]]
    if not naming:
        return {"chair_s": None, "chair_i": None, "chair_s_all": None}
    hallucinating = [float(score["hallucinated"] > 0) for score in known]
    return {
        "chair_s": sum(hallucinating) / len(naming),
        "chair_i": sum(score["hallucinated"] for score in naming) / sum(score["named"] for score in naming),
        "chair_s_all": fmean(hallucinating),
    }


REQUEST = """You list the objects in images from what was said about them. A question about an image was answered; take the answer as
true.

Question: {question}

Answer: {answer}

Which objects does the answer say can be seen?
1. List only objects that the answer names.
2. Give names alone, without attributes: no color, no material, no other property.
3. Output one JSON list, in one line: ["object_1", ..., "object_n"]
4. If it names no object that can be seen, the list is empty: []
"""
FENCED = re.compile(r"```json\n(.*?)\n```", re.DOTALL)


def read_list(reply: str) -> list[str] | None:
    """The list of names in a judge's reply: in a fenced block, else in its last line; None if there is none."""
    fenced = FENCED.search(reply)
    text = fenced[1] if fenced else reply.strip().rpartition("\n")[2]
    try:
        names = json.loads(text)
    except ValueError:
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def judge_of_objects(scoring: Scoring = "current", strict: bool = False, tagger: Tagger | None = None) -> Judge:
    """The judge that lists objects; its list is tagged by `tagger` ([`plain_tagger`])."""

    def messages(entry: Entry) -> list[dict[str, Any]]:
        request = REQUEST.format(question=entry["expected"].get("question", ""), answer=scored_text(entry))
        return [{"role": "system", "content": request}]

    def read(reply: str, entry: Entry) -> Scores | None:
        names = read_list(reply)
        if names is None:
            return None
        words = words_of(names, tagger or plain_tagger)
        return count_hallucinated(words, entry["expected"]["objects"]) | {"judged": True}

    return Judge(
        model="gpt-3.5-turbo-0613",
        applies=is_undecided,
        messages=messages,
        read=read,
        give_up=lambda entry: {**objhal(scored_text(entry), entry["expected"]), "judged": True},
        tries=5,
        temperatures=(0.0, 0.5, 1.0),
        max_tokens=1024,
        required=True,
    )


NO_NOUNS = """
    a an the this that these those some several many few one two three four five six of on in at by with and or to from
    large small big little tiny tall short long young old new red yellow green blue purple pink brown black white gray grey
    dark light bright colorful wooden metal plastic open closed empty full parked standing sitting
""".split()  # noqa: SIM905
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "policemen": "policeman",
    "gentlemen": "gentleman",
    "feet": "foot",
    "geese": "goose",
    "mice": "mouse",
    "teeth": "tooth",
    "knives": "knife",
    "calves": "calf",
    "loaves": "loaf",
    "leaves": "leaf",
    "shelves": "shelf",
    "buses": "bus",
    "thieves": "thief",
}


def plain_tagger(text: str) -> list[tuple[str, bool]]:
    """Words with their plurals taken away, all nouns but those that never are in a list of objects."""
    return [(singular(word), word.lower() not in NO_NOUNS) for word in re.findall(r"[\w'-]+", text)]


def singular(word: str) -> str:
    """A noun in the singular; words that COCO's table holds as they are stay."""
    if word in coco_names():
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    for plural, ending in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(plural) and len(word) > len(plural) + 1:
            return word.removesuffix(plural) + ending
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def spacy_tagger() -> Tagger:
    """The reference's tagger.

    Raises:
        MissingPackageError, MissingTaggerError: spaCy or its model is not installed; the message says how to get it.
    """
    require("hallucination", "spacy")
    import spacy

    if not spacy.util.is_package(SPACY_MODEL):
        raise MissingTaggerError(
            f"spaCy has no {SPACY_MODEL}: python -m spacy download {SPACY_MODEL} (what PyPI has under that name is not it)"
        )
    language = spacy.load(SPACY_MODEL)

    def tag(text: str) -> list[tuple[str, bool]]:
        return [(token.lemma_, token.tag_ in ("NN", "NNS", "NNP", "NNPS")) for token in language(text)]

    return tag
