"""Merge an adapter into its model: `minicpmv train merge ADAPTER OUTPUT` writes a whole model, ready for any engine.

What is special:
- the model is loaded in its own type, never in 4 bits: an adapter trained on a 4-bit model is merged into the exact one;
- modules that trained whole beside the adapter (the resampler) take the place of the model's own;
- the output holds code, processor and tokenizer as well, and can be tuned again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minicpmv.checkpoint import source_of
from minicpmv.errors import one_line_errors
from minicpmv.train.common.errors import ArgumentsError


def merge(adapter: Path, output: Path, trust_remote_code: bool = False) -> None:
    """Write the model with the adapter merged into it to the folder `output`.

    Raises:
        ArgumentsError: `adapter` holds none, or that of a reward model, its model is not there, or `output` is the folder of one
            of them.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (adapter / "adapter_config.json").is_file():
        raise ArgumentsError(f"{adapter} has no adapter_config.json, so it holds no adapter.")
    config = PeftConfig.from_pretrained(adapter)
    if "score" in (config.modules_to_save or ()):
        raise ArgumentsError(
            f"{adapter} is the adapter of a reward model, whose value head a merged model would lose. `minicpmv train rl` takes "
            "it as it is: --reward_model."
        )
    source = source_of(config.base_model_name_or_path, config.revision, trust_remote_code)
    if output.resolve() in (adapter.resolve(), Path(source["pretrained_model_name_or_path"]).resolve()):
        raise ArgumentsError(f"{output} holds what is to be merged, and would be written over. Name another folder.")
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # By hand, since PEFT does it for LoRA, but elsewhere looks for `weight` in it.
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
    model.merge_and_unload(safe_merge=True).save_pretrained(output)
    AutoProcessor.from_pretrained(**source).save_pretrained(output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="minicpmv train merge", description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="Folder that training with an adapter has left.")
    parser.add_argument("output", type=Path, help="New folder for the whole model.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that the Hub model brings.")
    options = parser.parse_args(argv)
    with one_line_errors():
        merge(options.adapter, options.output, options.trust_remote_code)
    print(f"{options.output}: the model with the adapter merged into it")


if __name__ == "__main__":
    main()
