"""Runs VLMEvalKit with a class that also watches videos, packed.

    python -m minicpmv.evaluate.adapters.vlmevalkit --model-path openbmb/MiniCPM-V-4_5 -- --data MMStar Video-MME_64frame

What is special:
- about images nothing is changed: prompts, thinking and decoding are those of VLMEvalKit's own class for 4.5, which drives
  this repository as it is, but fails on every video set;
- a video goes to the model's own processor, at the frames or the rate that the data set's name says, and the prompt is the
  data set's own;
- VLMEvalKit has no place to register a model from outside, so this puts it into its table and then runs its `run.py`.
"""

import argparse
import importlib.util
import math
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import vlmeval.vlm
from vlmeval.config import supported_VLM
from vlmeval.dataset import DATASET_MODALITY

from minicpmv.errors import MiniCPMVError, one_line_errors


NAME = "minicpmv"
VIDEO_ANSWER = {"decoding": "greedy", "max_new_tokens": 1024}
VIDEO_OPTIONS = ("fps", "max_num_frames", "max_num_packing", "force_packing", "max_inp_length")


class AdapterError(MiniCPMVError):
    """VLMEvalKit cannot be run: the message says what is missing."""


class MiniCPMV45(vlmeval.vlm.MiniCPM_V_4_5):
    """VLMEvalKit's class of MiniCPM-V 4.5, which watches videos too.

    Args:
        model_path: folder or Hub repository. Its code is trusted, as the class above does.
        thinking: also think about videos.
        video: options of the video processor, over what the data set says.
        kwargs: of `chat()`, over the settings of the class above, for images and videos.
    """

    VIDEO_LLM = True

    def __init__(
        self,
        model_path: str = "openbmb/MiniCPM-V-4_5",
        *,
        thinking: bool = False,
        video: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        with without_cuda():
            super().__init__(model_path, **kwargs)
        self.thinking, self.video = thinking, dict(video or {})
        self._num_frames: int | None = None
        self._fps: float | None = None

    # The runner writes what a data set wants into these two, but only where they hold a number that is another one.
    @property
    def nframe(self) -> float:
        return self._num_frames or math.inf

    @nframe.setter
    def nframe(self, count: int | None) -> None:
        self._num_frames = count

    @property
    def fps(self) -> float:
        return self._fps or math.inf

    @fps.setter
    def fps(self, rate: float | None) -> None:
        self._fps = rate

    def use_custom_prompt(self, dataset: str | None = None) -> bool:
        """Whether this class makes the prompt: not of videos, of which the class above knows none."""
        return DATASET_MODALITY(dataset) != "VIDEO" and super().use_custom_prompt(dataset)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        if not any(part["type"] == "video" for part in message):
            return super().generate_inner(message, dataset)
        sampling = {"num_frames": self._num_frames, "fps": self._fps}
        options = {name: value for name, value in sampling.items() if value is not None}
        if "fps" in self.video:  # the user's word against the data set's
            options.pop("num_frames", None)
        content = [
            part["value"] if part["type"] == "text" else {"type": part["type"], part["type"]: part["value"]}
            for part in message
        ]
        self.tokenizer.chat_template = self._original_chat_template  # questions about images may have changed it
        output = self.model.chat(
            msgs=[{"role": "user", "content": content}],
            processor=self.processor,
            enable_thinking=self.thinking,
            return_dict=True,
            **VIDEO_ANSWER | options | self.video | self.kwargs,
        )
        return output.text.strip()


def without_cuda() -> AbstractContextManager[Any]:
    """The class above moves its model to CUDA, which is not there on a machine without a GPU."""
    if torch.cuda.is_available():
        return nullcontext()
    return patch.object(torch.nn.Module, "cuda", lambda module, device=None: module)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options before `--`, register the model, and hand the rest to VLMEvalKit's run.py.

    Raises:
        AdapterError: there is no run.py.
    """
    parser = argparse.ArgumentParser(
        prog="python -m minicpmv.evaluate.adapters.vlmevalkit",
        description="Run VLMEvalKit with this model. Options after -- are those of its run.py.",
    )
    parser.add_argument("--model-path", default="openbmb/MiniCPM-V-4_5", help="Folder or Hub repository.")
    parser.add_argument("--thinking", action="store_true", help="Also think about videos.")
    parser.add_argument("--fps", type=float, help="Frames a second, whatever the data set's name says.")
    parser.add_argument("--max-num-frames", type=int, help="Most groups of frames.")
    parser.add_argument("--max-num-packing", type=int, help="Most frames in a group, 1 to 6.")
    parser.add_argument("--force-packing", type=int, help="Frames in each group.")
    parser.add_argument("--max-inp-length", type=int, default=32768, help="Most tokens of a prompt with a video.")
    parser.add_argument("--max-new-tokens", type=int, help="Most tokens of every thought and answer together.")
    parser.add_argument("--run-file", help="run.py of a clone of VLMEvalKit, where the package has none.")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, others = parser.parse_args(arguments[:place]), arguments[place + 1 :]

    run_file = own.run_file
    if run_file is None:
        spec = importlib.util.find_spec("vlmeval.run")
        run_file = spec.origin if spec else "run.py"
    if not os.path.isfile(run_file or ""):
        raise AdapterError("VLMEvalKit's run.py is not part of this package: give --run-file CLONE/run.py")
    video = {name: value for name in VIDEO_OPTIONS if (value := getattr(own, name)) is not None}
    more = {} if own.max_new_tokens is None else {"max_new_tokens": own.max_new_tokens}
    supported_VLM[NAME] = partial(MiniCPMV45, model_path=own.model_path, thinking=own.thinking, video=video, **more)
    vlmeval.vlm.MiniCPMV45 = MiniCPMV45  # for --config
    if not {"--model", "--config"} & set(others):
        others = ["--model", NAME, *others]
    sys.argv = [run_file, *others]
    runpy.run_path(run_file, run_name="__main__")


if __name__ == "__main__":
    with one_line_errors():
        main()
