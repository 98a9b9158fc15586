"""A video for an unmodified llama-server: the states of its prompt, packed as the model has learned it, in a file that the
server restores into a slot.

What is special:
- llama-server knows neither packing nor times. In the file the video has been read already: the server sees slot tokens
  whose states it has, and goes on behind them.
- The file holds the version of its own format, and a server of another one refuses it.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError
from minicpmv.files import write_whole


class SlotError(MiniCPMVError):
    """A video cannot be written for a llama-server."""


def export_slot(model: Any, processor: Any, video: Path, output: Path, **options: Any) -> Path:
    """Read a video and write `NAME.slot` with its states, and `NAME.json` with what a request has to say.

    Args:
        model, processor: as `minicpmv.load` returns them for a GGUF file.
        options: of the video processor: fps, force_packing, ...

    Returns:
        the JSON file: `restore` is the body of `POST /slots/0?action=restore`, `message` stands for the video in the
        messages that follow, with a line break between it and the question.

    Raises:
        SlotError: the model does not run in llama.cpp.
    """
    import torch

    if not hasattr(model.llm, "save_states"):
        raise SlotError("a slot needs a model in llama.cpp: name a file that minicpmv export gguf has written")
    messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    ).to(model.device)
    ids, tokenizer = inputs["input_ids"][0].tolist(), processor.tokenizer
    first, last = ids.index(tokenizer.im_start_id), len(ids) - ids[::-1].index(tokenizer.im_end_id)
    with torch.inference_mode():
        embeddings, _ = model.get_vllm_embedding(dict(inputs))
    output.mkdir(parents=True, exist_ok=True)
    slot = output / f"{video.stem}.slot"
    model.llm.save_states(ids[:last], embeddings[:, :last], slot)
    facts = {
        "restore": {"filename": slot.name},
        "message": tokenizer.decode(ids[first:last]),
        "tokens": last,
        "model": model.llm.file.name,
        "xllamacpp": version("xllamacpp"),
    }
    write_whole(slot.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return slot.with_suffix(".json")
