"""When an export counts as done."""

import numpy as np
import pytest

from minicpmv.deploy.parity import Case, Seen, compare, faults, hold, observe, relative_error


VOCABULARY = 5


def seen(answer, **changes):
    """A runtime that prefers the tokens of `answer` by two nats."""
    logits = np.zeros((len(answer), VOCABULARY), np.float32)
    logits[np.arange(len(answer)), answer] = 2
    return Seen(**{"prompt": [1, 2], "features": np.ones((1, 2, 3)), "answer": answer, "logits": logits} | changes)


def faults_of(reference, other, margin=0.1):
    return faults([compare("a case", reference, other)], margin, 1e-3)


def test_equal_answers_have_no_fault():
    assert faults_of(seen([3, 1]), seen([3, 1])) == []


def test_answers_may_part_where_pytorch_was_undecided():
    assert faults_of(seen([3, 1]), seen([3, 2])) == [
        "a case: the answer differs where PyTorch preferred its own by 2.00 nats, and 0.1 are allowed"
    ]
    assert faults_of(seen([3, 1]), seen([3, 2]), margin=2) == []


def test_what_comes_behind_the_first_difference_is_not_compared():
    close = np.zeros((3, VOCABULARY), np.float32)
    close[1:, 1] = (0.05, 9)
    assert faults_of(seen([3, 1, 1], logits=close), seen([3, 2, 4])) == []


def test_an_answer_that_only_goes_on_is_a_fault():
    reference = seen([3, 1])
    for answer in ([3, 1, 2], [3]):
        assert faults_of(reference, seen(answer, logits=reference.logits))


def test_prompts_have_to_be_equal_and_features_close():
    assert faults_of(seen([1]), seen([1], prompt=[1, 3])) == ["a case: the prompt has other tokens"]
    assert "image features differ by 0.01" in faults_of(seen([1]), seen([1], features=np.full((1, 2, 3), 1.01)))[0]
    assert relative_error(np.ones(2), np.ones(3)) == float("inf")


def test_software_that_shows_neither_features_nor_logits_is_held_by_its_answers():
    other = seen([3, 1], features=None, logits=None)
    assert faults_of(seen([3, 1]), other) == [] and faults_of(seen([3, 2]), other)
    assert compare("a case", seen([3, 1]), other).same_argmax is None


class Fixed:
    """A runtime that gives the same answer to everything."""

    versions = {"fixed": "1"}
    answerer = None
    alive = 0

    def __init__(self, answer):
        self.given = answer
        Fixed.alive += 1
        assert Fixed.alive == 1, "both runtimes are in memory at once"

    def __del__(self):
        Fixed.alive -= 1

    def prompt_ids(self, case):
        return [1]

    def features(self, case):
        return None

    def logits(self, case, answer):
        return seen(answer).logits

    def answer(self, case, most, least=0):
        return self.given[:most]


@pytest.mark.parametrize("other, fault_count", [([3, 1], 0), ([3, 2], 1)])
def test_the_reference_goes_before_the_other_comes(other, fault_count):
    asked = [Case("a case", [])]
    found = hold(
        observe(lambda: Fixed([3, 1]), asked),
        lambda: Fixed(other),
        asked,
        name="made up",
        type="f16",
        size=7,
        margin=0.1,
        feature_margin=0.1,
    )
    assert len(found.faults) == fault_count and found.bytes == 7 and found.versions == {"fixed": "1"}
