"""The language of a text, by py3langid (a model of 4.5 MB, without network)."""

from dataclasses import dataclass
from functools import cache


LEAST_BYTES = 20  # of letters; less is a guess


@dataclass(frozen=True)
class Language:
    code: str  # ISO 639, such as "en" or "zh"
    confidence: float  # from 0 to 1


def detect_language(text: str) -> Language | None:
    """The main language of a text; None where it has too few letters to tell.

    Raises:
        ImportError: py3langid is not installed.
    """
    letters = "".join(character if character.isalpha() else " " for character in text)
    letters = " ".join(letters.split())
    if len(letters.replace(" ", "").encode()) < LEAST_BYTES:
        return None
    code, confidence = _identifier().classify(letters)
    return Language(code, float(confidence))


@cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
