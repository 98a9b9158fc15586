"""Object HalBench: from a description to COCO objects, and how many of them are not there."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.errors import MissingPackageError
from minicpmv.evaluate.scoring.objects import (
    MissingTaggerError,
    chair,
    coco_names,
    coco_objects,
    count_hallucinated,
    judge_of_objects,
    objects_in_image,
    objhal,
    plain_tagger,
    read_list,
    spacy_tagger,
    words_of,
)


def test_the_table_names_the_eighty_objects_of_coco():
    assert len(set(coco_names().values())) == 80
    assert all(coco_names()[name] == name for name in coco_names().values())


def test_synonyms_become_coco_objects_and_other_words_are_left_out():
    assert coco_objects(["taxi", "sky", "woman", "bow tie"]) == ["car", "person", "tie"]
    assert coco_objects(["toilet", "seat"]) == ["toilet"]
    assert coco_objects(["seat"]) == ["chair"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["dogs", "dog"], ["dog"]),
        (["two knives", "glasses of water"], ["knife", "glass", "water"]),
        (["wine glasses"], ["wine glass"]),
        (["hot dogs", "a baby elephant"], ["hot dog", "elephant"]),
        (["tennis player"], ["tennis player"]),  # a run of nouns is one word, and this one is none of COCO's
        (["large brown bus"], ["bus"]),
        ([], []),
    ],
)
def test_listed_objects_become_words_each_once(names, words):
    assert words_of(names, plain_tagger) == words


def test_what_an_image_holds_is_what_is_annotated_and_what_people_wrote():
    found = objects_in_image(["person", "wine glass"], ["Two men sit at a dining table.", "A puppy under a bench"])
    assert found == ["bench", "dining table", "dog", "person", "wine glass"]


def counted(*answers):
    return chair([count_hallucinated(words, objects) for words, objects in answers])


def test_shares_are_of_answers_that_name_an_object_and_of_named_objects():
    answers = [(["cat", "sofa"], ["cat"]), (["lorry"], ["truck"]), (["sky"], ["kite"]), (["cat"], ["cat"])]
    assert counted(*answers) == {
        "chair_s": pytest.approx(1 / 3),
        "chair_i": pytest.approx(1 / 4),
        "chair_s_all": pytest.approx(1 / 4),
    }


def test_a_word_counts_once_and_its_synonym_again():
    assert count_hallucinated(["cab", "cab", "taxi"], [])["hallucinated"] == 2.0


def test_where_nothing_is_named_there_is_no_share():
    assert counted((["sky"], ["kite"])) == {"chair_s": None, "chair_i": None, "chair_s_all": None}


@given(st.lists(st.tuples(st.lists(st.sampled_from(sorted(coco_names()))), st.lists(st.sampled_from(["cat", "car"])))))
def test_shares_stay_shares(answers):
    for share in counted(*answers).values():
        assert share is None or 0 <= share <= 1


def test_a_short_answer_names_nothing_and_any_other_is_for_the_judge():
    assert not objhal("Just a cat", {"objects": []})["undecided"]
    assert objhal("Just a black cat", {"objects": []})["undecided"]


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ('["cat", "mat"]', ["cat", "mat"]),
        ('Here they are:\n["cat"]', ["cat"]),
        ('```json\n["cat",\n "mat"]\n```\nThat is all.', ["cat", "mat"]),
        ("[]", []),
        ("cat, mat", None),
        ("[1, 2]", None),
        ('{"objects": []}', None),
    ],
)
def test_the_judge_s_list_is_read_from_a_fenced_block_or_the_last_line(reply, names):
    assert read_list(reply) == names


def test_a_judged_description_is_counted_by_the_listed_objects():
    judge = judge_of_objects()
    entry = {"answer": "A kitten sleeps on the sofa.", "expected": {"objects": ["cat"], "question": "Describe it."}}
    assert "A kitten sleeps on the sofa." in judge.messages(entry)[0]["content"]
    scores = judge.read('["kitten", "sofa"]', entry)
    assert (scores["named"], scores["hallucinated"], scores["judged"]) == (2.0, 1.0, True)
    assert judge.read("a kitten", entry) is None
    assert chair([judge.give_up(entry)])["chair_s"] is None  # cannot be counted


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_the_reference_s_tagger_says_that_spacy_is_not_there():
    with pytest.raises(MissingPackageError, match="spacy"):
        spacy_tagger()


@pytest.fixture
def spacy(monkeypatch):
    """A stand-in for spaCy, whose model knows one word."""

    def tagged(text):
        kinds = {"giraffes": ("giraffe", "NNS")}
        return [
            SimpleNamespace(lemma_=lemma, tag_=tag) for lemma, tag in (kinds.get(w, (w, "DT")) for w in text.split())
        ]

    module = ModuleType("spacy")
    module.__spec__ = ModuleSpec("spacy", None)
    module.util = SimpleNamespace(is_package=lambda name: True)
    module.load = lambda name: tagged
    monkeypatch.setitem(sys.modules, "spacy", module)
    return module


def test_the_reference_s_tagger_takes_lemmas_and_nouns_from_its_model(spacy):
    assert spacy_tagger()("a giraffes") == [("a", False), ("giraffe", True)]
    assert words_of(["giraffes"], spacy_tagger()) == ["giraffe"]


def test_the_reference_s_tagger_says_how_to_get_its_model(spacy):
    spacy.util.is_package = lambda name: False
    with pytest.raises(MissingTaggerError, match="spacy download en_core_web_trf"):
        spacy_tagger()
