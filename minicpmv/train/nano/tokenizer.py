"""nano's tokenizer: byte-level BPE with few merges, learned from the questions and answers of the synthetic tasks.

    python -m minicpmv.train.nano.tokenizer [FOLDER]

What is special:
- normalizer, pre-tokenizer and all added tokens are those of the full model, so templates and placeholders work by name;
- ids are its own: 256 bytes ("!" is 0), merges, then the added tokens;
- no merge joins two capitals or digits, so print is read character by character.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from minicpmv.build_tokenizer import REPOSITORY, backend, byte_alphabet
from minicpmv.drawn.wording import WORDINGS
from minicpmv.errors import one_line_errors
from minicpmv.train.common.errors import ArgumentsError


# Later ones did not touch the tokenizer, which stays as the weights know it.
KNOWN_TASKS = (
    *("printed_line", "text_colour", "form_value", "colour", "shape", "only_shape", "count", "position"),
    *("position_colour", "absent_object", "caption", "chart_value", "chart_highest", "chart_lowest", "chart_bars"),
    *(
        "multistep_sum",
        "multistep_price",
        "video_direction",
        "video_order",
        "video_first",
        "video_last",
        "video_count",
    ),
)
VOCABULARY_SIZE = 896  # bytes and merges; the corpus has fewer merges than that to give


def corpus() -> list[str]:
    """Every question, answer, thought and name of a role."""
    lines = []
    for say in WORDINGS.values():
        names = [*say.colors.values(), *say.shapes.values(), *say.sides.values(), say.any_shape]
        lines += [
            phrase.format(subject)
            for task, phrases in say.phrases.items()
            if task in KNOWN_TASKS
            for phrase in phrases
            for subject in names
        ]
        lines += [say.seen.format(say.listing([name, name])) for name in names]
        lines += [say.price.format(name=name, price="") for name in say.shapes.values()]
        lines += 4 * [*names, say.yes, say.no, say.comma]  # a merge needs to be seen more than once
    return lines + 4 * ["system", "user", "assistant", "\n\n"]


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
    """Write tokenizer.json and tokenizer_config.json; returns the number of ids.

    Raises:
        ArgumentsError: this is an installed package, without the full model's settings beside it.
    """
    if not (REPOSITORY / "tokenizer_config.json").is_file():
        raise ArgumentsError(
            "The tokenizer of nano is made from the settings of the full model, which a clone of the repository holds and an "
            "installed package does not: run this in a clone."
        )
    config = json.loads((REPOSITORY / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary, merges = train_merges()
    added = [fields for _, fields in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    config["added_tokens_decoder"] = {str(len(vocabulary) + i): fields for i, fields in enumerate(added)}
    config["model_max_length"] = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    tokenizer = backend(vocabulary, merges, config)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=REPOSITORY / "nano")
    folder = parser.parse_args(argv).folder
    with one_line_errors():
        print(f"{folder}: {build(folder)} tokens")


if __name__ == "__main__":
    main()
