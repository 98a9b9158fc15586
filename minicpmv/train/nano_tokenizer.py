"""nano's tokenizer: byte-level BPE with few merges, learnt from the questions and answers of the synthetic tasks.

    python -m minicpmv.train.nano_tokenizer [FOLDER]

What is special:
- normaliser, pre-tokenizer and all added tokens are those of the full model, so templates and placeholders work by name;
- ids are its own: 256 bytes ("!" is 0), merges, then the added tokens;
- no merge joins two capitals or digits, so print is read character by character.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from minicpmv.build_tokenizer import REPOSITORY, backend, byte_alphabet
from minicpmv.data.drawing import COLORS, SHAPES
from minicpmv.data.synthetic import PHRASES


VOCABULARY_SIZE = 512  # bytes and merges; the corpus has fewer merges than that to give


def corpus() -> list[str]:
    """Every question, answer and name of a role."""
    places = ("left", "right", "top", "bottom", "up", "down")
    subjects = (*COLORS, *SHAPES, *places, "shape", *(f"{color} {shape}" for color in COLORS for shape in SHAPES))
    lines = [phrase.format(subject) for phrases in PHRASES.values() for phrase in phrases for subject in subjects]
    lines += [f"{article} {subject}, {article} {subject}" for subject in subjects for article in ("a", "an")]
    once = ["yes", "no", "the word", "the number", "system", "user", "assistant", "\n\n"]
    return lines + 4 * [*subjects, *once]  # a merge needs to be seen more than once


def train_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`({token: id}, merges)` in the byte-level alphabet."""
    alphabet = sorted(byte_alphabet().values())  # "!" comes first
    config = json.loads((REPOSITORY / "tokenizer_config.json").read_text(encoding="utf-8"))
    # One merge, because a merges file must not be empty; only the steps before BPE are taken from this tokenizer.
    full = backend({token: i for i, token in enumerate([*alphabet, "th"])}, [("t", "h")], config)
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = full.normalizer, full.pre_tokenizer
    trainer = BpeTrainer(vocab_size=VOCABULARY_SIZE, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(corpus(), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges


def build(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the number of ids."""
    config = json.loads((REPOSITORY / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary, merges = train_merges()
    added = [fields for _, fields in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    config["added_tokens_decoder"] = {str(len(vocabulary) + i): fields for i, fields in enumerate(added)}
    config["model_max_length"] = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    tokenizer = backend(vocabulary, merges, config)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=REPOSITORY / "nano")
    folder = parser.parse_args(argv).folder
    print(f"{folder}: {build(folder)} tokens")


if __name__ == "__main__":
    main()
