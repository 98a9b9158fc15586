"""Options of `minicpmv align feedback`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from minicpmv.files import file_digest
from minicpmv.train.common.arguments import ModelArguments, option
from minicpmv.train.common.errors import ArgumentsError


# What may differ between a run and the one that goes on from its log.
FREE_OPTIONS = [
    "output_dir",
    "batch_size",
    "pairs_per_prompt",
    "length_tolerance",
    "max_prompts",
    "on_bad_row",
    "use_cpu",
]


@dataclass
class FeedbackArguments:
    _argument_group_name = "feedback"

    dataset_name: str = option(
        None,
        "Conversations to take the prompts from: a file, a folder, or owner/name on the Hub. Their answers are ignored.",
    )
    output_dir: str = option(None, "Folder for the log, the pairs and the summary.")
    dataset_split: str | None = option(None, "Split that holds the prompts, if there are several.")
    image_folder: str | None = option(
        None, "Folder that relative image and video paths start from (default: the folder of the data file)."
    )
    on_bad_row: Literal["raise", "skip"] = option("raise", "Stop at a bad row, or skip and count it.")
    first_prompt: int = option(0, "Index of the first prompt; give each round its own.")
    max_prompts: int | None = option(None, "Maximum number of prompts (default: all).")
    num_answers: int = option(8, "Answers to sample for each prompt.")
    temperature: float = option(1.0, "Sampling temperature.")
    top_p: float = option(1.0, "Sample from the most probable tokens that together have this probability.")
    max_new_tokens: int = option(512, "Maximum number of tokens of an answer; answers cut off there are not used.")
    feedback_model: str | None = option(
        None, "Model that judges the claims: a folder, or owner/name on the Hub (default: the model itself)."
    )
    feedback_model_revision: str | None = option(None, "Commit, tag or branch of the feedback model on the Hub.")
    claims: Literal["rule", "model"] = option(
        "rule", "How to split answers into claims: by rule (captions that list things), or by a language model."
    )
    claims_model: str | None = option(
        None, "Language model for --claims model: a folder, or owner/name on the Hub (default: the feedback model)."
    )
    pairs_per_prompt: int = option(2, "Maximum number of pairs of one prompt.")
    length_tolerance: float = option(
        0.25, "How much the length differences of two matched pairs may differ, as a share."
    )
    batch_size: int = option(8, "Prompts at a time.")
    seed: int = option(0, "Seed of the sampling.")
    use_cpu: bool = option(False, "Use the CPU even if there is an accelerator.")
    trust_remote_code: bool = option(False, "Run the code that models on the Hub bring with them.")

    def __post_init__(self):
        for name in ("dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ArgumentsError(f"{name} is missing.")
        least = {"num_answers": 2, "max_new_tokens": 1, "pairs_per_prompt": 1, "batch_size": 1, "first_prompt": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ArgumentsError(f"{name} is {getattr(self, name)}, but has to be at least {limit}.")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ArgumentsError(f"max_prompts is {self.max_prompts}, but has to be at least 1.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or not 0 <= self.length_tolerance < 1:
            raise ArgumentsError(
                f"temperature {self.temperature} must be more than 0, top_p {self.top_p} more than 0 and at most 1, "
                f"length_tolerance {self.length_tolerance} from 0 to below 1."
            )
        if self.claims_model is not None and self.claims != "model":
            raise ArgumentsError("claims_model is given, but claims are made by rule. Add claims: model.")


def settings_of(args: FeedbackArguments, model_args: ModelArguments) -> dict[str, Any]:
    """What decides about the content of a log."""
    settings = asdict(args) | {"model_name_or_path": model_args.model_name_or_path, "dtype": model_args.dtype}
    # A model that was trained further under the same path is another one.
    settings["weights"] = [weights_digests(name) for name in (model_args.model_name_or_path, args.feedback_model)]
    return {name: value for name, value in settings.items() if name not in FREE_OPTIONS}


def weights_digests(name: str | None) -> list[str] | None:
    """16 hexadecimal digits for each weight file in a folder; None for a name on the Hub, whose revision tells them apart."""
    if name is None or not Path(name).is_dir():
        return None
    return [file_digest(path)[:16] for path in sorted(Path(name).glob("*.safetensors"))]
