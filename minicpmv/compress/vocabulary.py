"""A vocabulary without what a corpus never uses: tokenizer and rows of the weights together.

What is special:
- A text of the corpus has the same tokens as before, one for one: of a token that stays, all tokens that it is merged from
  stay too. Every other text can still be written, in smaller pieces, since the 256 bytes stay.
- All added tokens stay: placeholders, boxes, thoughts, and those that were reserved.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicpmv.compress.shapes import CompressionError
from minicpmv.data.load import JSON_SUFFIXES, load_conversations
from minicpmv.drawn.stream import is_description
from minicpmv.files import read_json, write_whole


TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def corpus_texts(source: str, processor: Any) -> Iterator[str]:
    """The texts of a corpus: a text file line by line, or conversations as the chat template writes them.

    Args:
        source: a text file, or what [`minicpmv.data.load.load_conversations`] reads.

    Raises:
        CompressionError: there is no such file.
        DataError: the rows cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise CompressionError(f"{source} does not exist: give a text file, or rows of conversations")
    if path.suffix not in JSON_SUFFIXES and not is_description(path) and path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from lines
        return
    for row in load_conversations(str(path)):
        yield processor.apply_chat_template(row["messages"], tokenize=False)


def templates(processor: Any) -> Iterator[str]:
    """What the chat template writes around any text: its tokens are always used."""
    messages = [{"role": role, "content": "."} for role in ("system", "user", "assistant", "user")]
    for thinking in (True, False):
        yield processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )


def used_ids(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """The ids of all tokens of the texts."""
    found: set[int] = set()
    for text in texts:
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def kept_ids(settings: dict[str, Any], used: Iterable[int]) -> list[int]:
    """Sorted ids that stay when these are used.

    Args:
        settings: the contents of a tokenizer.json.

    Raises:
        CompressionError: it is no byte-level BPE.
    """
    model = settings["model"]
    if model.get("type") != "BPE":
        raise CompressionError(
            f"The tokenizer is a {model.get('type')}, and a BPE can be cut: leave out the vocabulary"
        )
    vocabulary = model["vocab"]
    tokens = {number: token for token, number in vocabulary.items()}
    pieces: dict[str, list[str]] = {}
    for merge in model["merges"]:
        left, right = _pair(merge)
        pieces.setdefault(left + right, []).extend((left, right))
    added = [entry["id"] for entry in settings["added_tokens"]]  # of which some may be merged as well, as `<unk>`
    stays: set[str] = set()
    waiting = [tokens[number] for number in (*used, *added) if number in tokens]
    waiting += [token for token in vocabulary if len(token) == 1]  # the bytes
    while waiting:
        token = waiting.pop()
        if token not in stays:
            stays.add(token)
            waiting += pieces.get(token, ())
    return sorted({*(vocabulary[token] for token in stays), *added})


def cut_settings(settings: dict[str, Any], kept: Iterable[int]) -> dict[str, Any]:
    """The contents of tokenizer.json with the tokens that stay, numbered from 0 in their old order."""
    new_ids = {old: new for new, old in enumerate(kept)}
    model = settings["model"]
    vocabulary = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    merges = [merge for merge in model["merges"] if "".join(_pair(merge)) in vocabulary]
    added = [entry | {"id": new_ids[entry["id"]]} for entry in settings["added_tokens"]]
    return settings | {"model": model | {"vocab": vocabulary, "merges": merges}, "added_tokens": added}


def cut_files(folder: Path, kept: Iterable[int]) -> None:
    """Cut the tokenizer in a folder."""
    kept = list(kept)
    settings = cut_settings(read_json(folder / TOKENIZER_FILE), kept)
    write_whole(folder / TOKENIZER_FILE, json.dumps(settings, ensure_ascii=False) + "\n")
    config = read_json(folder / CONFIG_FILE)
    if "added_tokens_decoder" in config:  # as transformers 4 writes it
        new_ids = {old: new for new, old in enumerate(kept)}
        config["added_tokens_decoder"] = {
            str(new_ids[int(old)]): token for old, token in config["added_tokens_decoder"].items()
        }
        write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
