"""The card of a trained model: what it came from, what trained and how, what was reached, how to load it.

It states what the run itself knows, and leaves no headings to fill in.
"""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import extract_hyperparameters_from_trainer

from minicpmv.train.common.curves import is_measure
from minicpmv.train.common.loading import trained_parameters


def write_card(trainer, method: str, dataset: str | None = None) -> None:
    """Write `README.md` into the output folder of `trainer`, on the main process only.

    Args:
        method: what was done, as it reads after "by".
        dataset: name or file of the training data.
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, has_adapter = model.config._name_or_path, hasattr(model, "peft_config")
    on_hub, answers = not Path(base).is_dir(), model.can_generate()  # else it is a reward model
    reached = {name: value for entry in trainer.state.log_history for name, value in entry.items() if is_measure(name)}
    ModelCard.from_template(
        ModelCardData(
            base_model=base if on_hub else None,
            library_name="peft" if has_adapter else "transformers",
            pipeline_tag="image-text-to-text" if answers else None,
            tags=["minicpm-v", "custom_code", "generated_from_trainer"],
        ),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=trainer.args.hub_model_id or Path(trainer.args.output_dir).name,
        base=base if on_hub else Path(base).name,
        adapter=[config.peft_type.value for config in model.peft_config.values()] if has_adapter else None,
        answers=answers,
        method=method,
        dataset=dataset,
        parts={
            part: sum(parameter.numel() for _, parameter in parameters)
            for part, parameters in trained_parameters(model).items()
            if parameters
        },
        hyperparameters=extract_hyperparameters_from_trainer(trainer),
        step=trainer.state.global_step,
        reached=reached,
        versions={name: version(name) for name in ("transformers", "trl", "peft", "accelerate", "torch")},
    ).save(Path(trainer.args.output_dir) / "README.md")
