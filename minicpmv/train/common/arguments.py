"""Options of the training commands: dataclasses, filled from one YAML file and from flags of the same names.

What is special:
- a value in the file goes through the same checks as a flag, since it becomes one; a flag wins over the file. (TrlParser
  makes defaults of them, which argparse checks only where they are strings: `lora_r: 1.5` would pass.)
- everything is checked before a model loads: names (with a suggestion), types, files, options that contradict each other;
- names are those of TRL and PEFT where they have one (`model_name_or_path`, `lora_r`, `dataset_name`, ...), and the
  options of the trainer itself (`SFTConfig`, `DPOConfig`, ...) stand beside them.
"""

import argparse
import dataclasses
import importlib.util
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from minicpmv.train.common.errors import ArgumentsError
from minicpmv.train.common.names import MODEL_FLAGS, check_data_name, check_model_name, did_you_mean
from minicpmv.train.common.precision import fast_type


# The linear layers of the language model: engines serve adapters on these only. (`all-linear` would take the tower too.)
LLM_LINEAR_LAYERS = r"(model\.)?llm\..*\.(q|k|v|o|gate|up|down)_proj"  # model.: under a value head
LORA_METHODS = ("lora", "qlora", "dora")
# What they are called here, and in the model. The first that trains is the one whose learning rate trainers log.
PARTS = {"llm": "llm", "resampler": "resampler", "tower": "vpm"}


def option(default: Any, help: str, **settings: Any) -> Any:
    """A field with a help text; `settings` are those of argparse's `add_argument`."""
    return field(default=default, metadata={"help": help, **settings})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = option(
        None,
        "Model folder, or owner/name on the Hub (with --trust_remote_code).",
        aliases=[flag for flag in MODEL_FLAGS if "name" not in flag],
    )
    model_revision: str | None = option(None, "Commit, tag or branch of the model on the Hub.")
    dtype: str | None = option(
        None,
        "dtype of the frozen weights (default: the checkpoint's). Trained weights are float32, since bfloat16 loses small "
        "steps; with --bf16 they compute in bfloat16.",
        choices=["float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = option(
        None, "Attention kernel: sdpa, eager, flash_attention_2, ... (default: chosen by transformers)."
    )

    def __post_init__(self):
        check_model_name(self.model_name_or_path)


@dataclass
class AdapterArguments:
    _argument_group_name = "adapter"

    adapter: str = option(
        "none",
        "none (train the weights themselves), lora, qlora (LoRA on a 4-bit model), dora, or another PEFT method that adapts "
        "modules: adalora, loha, lokr, oft, ia3, ...",
    )
    lora_r: int = option(16, "Rank of LoRA, QLoRA and DoRA.")
    lora_alpha: int = option(32, "Scale of LoRA, QLoRA and DoRA: the update is multiplied by alpha / r.")
    lora_dropout: float = option(0.05, "Dropout of LoRA, QLoRA and DoRA.")
    target_modules: list[str] | None = option(
        None, "Module names, or one regular expression (default: the linear layers of the language model)."
    )
    modules_to_save: list[str] | None = option(
        None, "Further modules to train in full and save with the adapter, such as embed_tokens."
    )
    adapter_options: dict | str | None = option(
        None, "Further fields of the method's PEFT config, as a mapping or JSON: {use_rslora: true}."
    )

    def __post_init__(self):
        self.adapter = self.adapter.lower()
        if self.adapter == "none":
            for name in ("target_modules", "modules_to_save", "adapter_options"):
                if getattr(self, name):
                    raise ArgumentsError(f"{name} belongs to an adapter, but adapter is 'none'. Give adapter: lora.")
            return
        if isinstance(self.adapter_options, str):
            try:
                self.adapter_options = json.loads(self.adapter_options)
            except json.JSONDecodeError as error:
                raise ArgumentsError(f"adapter_options is not JSON: {self.adapter_options!r} ({error})") from error
        if self.adapter_options is not None and not isinstance(self.adapter_options, dict):
            raise ArgumentsError(f"adapter_options must be a mapping, but is {self.adapter_options!r}.")
        self._check_method()
        if self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ArgumentsError(
                f"lora_r {self.lora_r} must be at least 1, lora_alpha {self.lora_alpha} more than 0, and lora_dropout "
                f"{self.lora_dropout} from 0 to below 1."
            )
        try:
            self.peft_config()
        except (TypeError, ValueError) as error:
            raise ArgumentsError(f"adapter {self.adapter!r}: {error}") from error

    def _check_method(self):
        if self.adapter == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
            raise ArgumentsError(
                "adapter 'qlora' needs bitsandbytes, which is not installed: pip install bitsandbytes, or take "
                "adapter: lora."
            )
        methods = adapter_methods()
        if self.adapter not in methods:
            raise ArgumentsError(
                f"There is no adapter {self.adapter!r}.{did_you_mean(self.adapter, ['none', *methods])}"
            )
        known = {entry.name for entry in dataclasses.fields(methods[self.adapter])}
        for name in self.adapter_options or {}:
            if name not in known:
                config = methods[self.adapter].__name__
                raise ArgumentsError(f"adapter_options: {config} has no field {name!r}.{did_you_mean(name, known)}")
        if self.adapter not in LORA_METHODS:
            for name in ("lora_r", "lora_alpha", "lora_dropout"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ArgumentsError(
                        f"{name} belongs to lora, qlora and dora, but adapter is {self.adapter!r}. Give its own fields in "
                        "adapter_options."
                    )

    def peft_config(self, also_train: Sequence[str] = (), task_type: str | None = "CAUSAL_LM") -> Any:
        """The method's PEFT config, or None without an adapter; the modules in `also_train` train in full with it."""
        if self.adapter == "none":
            return None
        targets = self.target_modules or [LLM_LINEAR_LAYERS]
        fields: dict[str, Any] = {
            "task_type": task_type,
            # PEFT takes a lone string as an expression.
            "target_modules": targets[0] if len(targets) == 1 else targets,
            "modules_to_save": [*also_train, *(self.modules_to_save or [])] or None,
        }
        if self.adapter in LORA_METHODS:
            fields |= {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
            fields["use_dora"] = self.adapter == "dora"
        more = self.adapter_options if isinstance(self.adapter_options, dict) else {}
        return adapter_methods()[self.adapter](**fields | more)


def adapter_methods() -> dict[str, type]:
    """Names of adapter methods -> their PEFT configs: those that change modules, not those that add tokens."""
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    methods = {
        kind.value.lower(): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "target_modules" in config.__dataclass_fields__
    }
    return methods | dict.fromkeys(LORA_METHODS, LoraConfig)


@dataclass
class FreezeArguments:
    _argument_group_name = "what trains"

    train_tower: bool | None = option(None, "Train the vision tower (default: only without an adapter).")
    train_resampler: bool | None = option(None, "Train the resampler (default: only without an adapter).")
    train_llm: bool | None = option(
        None, "Train the language model (default: yes; with an adapter, the adapter trains in its place)."
    )
    tower_learning_rate: float | None = option(None, "Learning rate of the vision tower (default: learning_rate).")
    resampler_learning_rate: float | None = option(None, "Learning rate of the resampler (default: learning_rate).")
    llm_learning_rate: float | None = option(
        None, "Learning rate of the language model or its adapter (default: learning_rate)."
    )

    def __post_init__(self):
        for part, rate in self.learning_rates().items():
            if rate <= 0:
                raise ArgumentsError(f"{part}_learning_rate is {rate}, but has to be more than 0.")
            if getattr(self, f"train_{part}") is False:
                raise ArgumentsError(f"{part}_learning_rate is given, but train_{part} is false. Drop one of the two.")

    def learning_rates(self) -> dict[str, float]:
        """`{part: rate}` of the parts that have their own."""
        rates = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def trained(self, has_adapter: bool) -> dict[str, bool]:
        """`{part: bool}`: whether the weights of the part itself train."""
        return {
            part: not has_adapter if getattr(self, f"train_{part}") is None else getattr(self, f"train_{part}")
            for part in PARTS
        }


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset_name: str = option(
        None, "Training data: a file (.json, .jsonl, .parquet, ...), a folder, or owner/name on the Hub."
    )
    dataset_train_split: str | None = option(None, "Split to train on; JSON files have none.")
    eval_dataset_name: str | None = option(None, "Evaluation data (default: dataset_name, with dataset_test_split).")
    dataset_test_split: str | None = option(None, "Split to evaluate on.")
    dataset_streaming: bool = option(False, "Read rows while training instead of before; needs max_steps.")
    image_folder: str | None = option(
        None, "Folder that relative image and video paths start from (default: the folder of the data file)."
    )
    on_bad_row: typing.Literal["raise", "skip"] = option("raise", "Stop at a bad row, or skip and count it.")
    on_too_long: typing.Literal["error", "drop", "shorten"] = option(
        "error", "For a sample over max_length: stop, drop it, or cut text from its oldest turns."
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise ArgumentsError("dataset_name is missing: a file, a folder, or a name on the Hub.")
        for name in ("dataset_name", "eval_dataset_name"):
            if (value := getattr(self, name)) is not None:
                check_data_name(name, value)
        if self.image_folder is not None and not Path(self.image_folder).expanduser().is_dir():
            raise ArgumentsError(f"image_folder: {self.image_folder} is not a folder.")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States the defaults that a flag could give: None says nothing, and the help text tells what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentsParser(HfArgumentParser):
    """Raises where argparse would print its usage and end the process."""

    def error(self, message: str) -> typing.NoReturn:
        raise ArgumentsError(message)


def parse(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Fill dataclasses from `--config FILE.yaml` and flags.

    Args:
        dataclass_types: the dataclasses above that a command needs, and the config of its trainer.
        argv: the flags (default: those of the process).

    Returns:
        One instance of each dataclass, in order.

    Raises:
        ArgumentsError: what is wrong, and where it can be told, what to write instead.
    """
    usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
    parser = ArgumentsParser(
        dataclass_types, usage=usage, description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options under the names of the flags.")
    if "use_cpu" in {action.dest for action in parser._actions} and not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)  # else the default of bf16 would be refused
        if fast_type(torch.device("cpu")) is torch.float32:
            parser.set_defaults(bf16=False)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    config, flags = before.parse_known_args(argv)
    if config.config is not None:
        flags = [*_flags_of_file(parser, Path(config.config)), *flags]
    _, unknown = parser.parse_known_args(flags)
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        raise ArgumentsError(f"There is no option {unknown[0]}.{did_you_mean(unknown[0].split('=')[0], names)}")
    try:
        *filled, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)  # the last one is --config
    except (ValueError, TypeError, ImportError) as error:  # what the trainer's config finds wrong
        raise error if isinstance(error, ArgumentsError) else ArgumentsError(str(error)) from error
    check_together(filled)
    return tuple(filled)


def _flags_of_file(parser: ArgumentsParser, path: Path) -> list[str]:
    """The options of a YAML file as flags, so that they are read like those. What no flag can say becomes a default."""
    if not path.is_file():
        raise ArgumentsError(f"--config: {path} does not exist.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ArgumentsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ArgumentsError(f"{path} is not a mapping of options to values.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    hints = {name: hint for kind in parser.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    flags = []
    for name, value in options.items():
        if name not in actions:
            raise ArgumentsError(f"{path}: there is no option {name!r}.{did_you_mean(str(name), actions)}")
        if isinstance(value, dict) and "dict" not in str(hints[name]):
            raise ArgumentsError(f"{path}: {name} takes no mapping, but is {value!r}.")
        if isinstance(value, list) and "list" not in str(hints[name]):
            raise ArgumentsError(f"{path}: {name} takes one value, but is {value!r}.")
        if isinstance(value, list) and value and actions[name].nargs is not None:
            flags += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, (dict, list)):
            parser.set_defaults(**{name: value})
        else:
            flags.append(f"--{name}={value}")
    return flags


def check_together(groups: Sequence[Any]) -> None:
    """What one group of options cannot see alone.

    Raises:
        ArgumentsError: two contradict each other.
    """
    found = {type(group): group for group in groups}
    adapter, parts = found.get(AdapterArguments), found.get(FreezeArguments)
    if adapter is None or parts is None:
        return
    has_adapter = adapter.adapter != "none"
    trained = parts.trained(has_adapter)
    if has_adapter and parts.train_llm:
        raise ArgumentsError(
            "train_llm trains the weights of the language model; an adapter trains in their place. Drop one of the two."
        )
    if not has_adapter and not any(trained.values()):
        raise ArgumentsError("Nothing would train: tower, resampler and llm are all frozen and there is no adapter.")
    for part in parts.learning_rates():
        if has_adapter and not trained[part] and part != "llm" and adapter.target_modules is None:
            raise ArgumentsError(f"{part}_learning_rate is given, but the {part} is frozen. Add train_{part}: true.")
