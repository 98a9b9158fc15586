"""Write tokenizer.json, which is too large for git, from the vocabulary that the PyPI package dashscope carries.

    minicpmv build-tokenizer [FOLDER] [--from-hub] [--revision REVISION]

qwen.tiktoken lists byte strings by rank. A rank is an id, and a token of rank r came from merging the two pieces
that byte-pair encoding leaves of it when only ranks below r are known: vocabulary and merges follow from it alone.
Normaliser and pre-tokenizer are those of transformers' Qwen2Tokenizer, the added tokens those of tokenizer_config.json.
"""

import base64
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from minicpmv.checkpoint import PUBLISHED
from minicpmv.errors import MiniCPMVError


REPOSITORY = Path(__file__).resolve().parents[1]

RANKS_FILE = "dashscope/resources/qwen.tiktoken"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
# `fingerprint` of the 151,643 tokens and 151,387 merges
VOCABULARY_SHA256 = "ad061afcfc26a5ff7b7611ace84657fe939d902af56b06ba07d823fec5668050"


Ranks = dict[bytes, int]  # of byte strings; a rank is an id
Vocabulary = dict[str, int]
Merges = Sequence[tuple[str, ...]]


class VocabularyError(MiniCPMVError):
    """The vocabulary file is missing, or is not the one that the checkpoint was trained with."""


def byte_alphabet() -> dict[int, str]:
    """The byte-level alphabet: byte -> printable character. Bytes without a glyph take 256, 257, ... in turn."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def read_ranks(path: str | Path | None = None) -> dict[bytes, int]:
    """`{byte string: rank}` from qwen.tiktoken; found in the installed dashscope, whose code is not imported."""
    if path is None:
        try:
            path = str(metadata.distribution("dashscope").locate_file(RANKS_FILE))
        except metadata.PackageNotFoundError:
            path = RANKS_FILE
    path = Path(path)
    if not path.is_file():
        raise VocabularyError(
            f"{path} was not found; run `pip install dashscope`, which carries it, "
            "or `minicpmv build-tokenizer --from-hub` where the Hub can be reached"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != RANKS_SHA256:
        raise VocabularyError(
            f"{path} has sha256 {digest}, not {RANKS_SHA256}; run `pip install dashscope==2.0.2` "
            "or `minicpmv build-tokenizer --from-hub`"
        )
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def recover_merge(token: bytes, ranks: Ranks) -> tuple[bytes, ...]:
    """The pair that byte-pair encoding merged last to make `token` (bytes, at least two)."""
    limit = ranks[token]
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        rank, i = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(pieces)))
        if rank == limit:
            raise VocabularyError(f"token {token!r} of rank {limit} is no merge of two tokens of lower rank")
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return tuple(pieces)


def recover_vocabulary(ranks: Ranks) -> tuple[Vocabulary, Merges]:
    """`({token: id}, [(left, right), ...])` in the byte-level alphabet, merges in rank order (a few seconds)."""
    alphabet = byte_alphabet()

    def spell(token):
        return "".join(map(alphabet.__getitem__, token))

    in_order = sorted(ranks, key=ranks.__getitem__)
    vocabulary = {spell(token): ranks[token] for token in in_order}
    return vocabulary, [tuple(map(spell, recover_merge(token, ranks))) for token in in_order if len(token) > 1]


def fingerprint(vocabulary: Vocabulary, merges: Merges) -> str:
    """sha256 over the tokens in id order and the merges in rank order."""
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise VocabularyError(f"the ids of {len(tokens)} tokens are not 0 .. {len(tokens) - 1}")
    return hashlib.sha256("\n".join([*tokens, "", *map(" ".join, merges)]).encode()).hexdigest()


def added_tokens(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """`{id: fields}` from the contents of tokenizer_config.json."""
    return {int(token_id): fields for token_id, fields in config["added_tokens_decoder"].items()}


def check(tokenizer_json: dict[str, Any], config: dict[str, Any]) -> None:
    """Compare the contents of a tokenizer.json with what this repository needs.

    Raises:
        VocabularyError: they differ.
    """
    model = tokenizer_json["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    digest = fingerprint(model["vocab"], merges)
    if digest != VOCABULARY_SHA256:
        raise VocabularyError(
            f"{len(model['vocab'])} tokens and {len(merges)} merges with sha256 {digest}, not {VOCABULARY_SHA256}"
        )
    found = {fields["id"]: {k: v for k, v in fields.items() if k != "id"} for fields in tokenizer_json["added_tokens"]}
    wanted = added_tokens(config)
    if found != wanted:
        differing = sorted(i for i in found.keys() | wanted.keys() if found.get(i) != wanted.get(i))
        raise VocabularyError(f"added tokens differ from tokenizer_config.json at ids {differing}")


def is_current(path: Path, config: dict[str, Any]) -> bool:
    """Whether `path` holds the tokenizer that `build` would write."""
    try:
        check(json.loads(path.read_text(encoding="utf-8")), config)
    except (FileNotFoundError, json.JSONDecodeError, KeyError, VocabularyError):
        return False
    return True


def backend(vocabulary: Vocabulary, merges: Merges, config: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` that transformers' own Qwen2 class makes of vocabulary, merges and added tokens."""
    from transformers import Qwen2TokenizerFast

    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    settings = {**special, "added_tokens_decoder": config["added_tokens_decoder"], "add_prefix_space": False}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return Qwen2TokenizerFast.from_pretrained(folder).backend_tokenizer


def from_hub(revision: str | None = None) -> tuple[Vocabulary, Merges]:
    """Vocabulary and merges as the Hub publishes them (vocab.json, merges.txt)."""
    from huggingface_hub import hf_hub_download

    paths = [Path(hf_hub_download(PUBLISHED, name, revision=revision)) for name in ("vocab.json", "merges.txt")]
    vocabulary = json.loads(paths[0].read_text(encoding="utf-8"))
    lines = paths[1].read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return vocabulary, merges


def build(folder: str | Path = REPOSITORY, hub: bool = False, revision: str | None = None) -> tuple[Path, bool]:
    """Write `folder/tokenizer.json` unless it is there already; returns `(path, whether it was written)`.

    Args:
        folder: holds tokenizer_config.json.
        hub: take vocabulary and merges from the Hub's `revision` instead of the package dashscope.

    Raises:
        VocabularyError: they are not there, or not those of the checkpoint.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VocabularyError(f"{error.filename} was not found; give the folder of the model repository") from None
    if is_current(path, config):
        return path, False
    source = from_hub(revision) if hub else recover_vocabulary(read_ranks())
    content = backend(*source, config).to_str()
    check(json.loads(content), config)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)  # atomic: a reader sees the old file or the whole new one
    finally:
        partial.unlink(missing_ok=True)
    return path, True
