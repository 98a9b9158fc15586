"""`minicpmv train VERB` and `minicpmv align VERB`: each verb is one module, which reads its own options.

The options of a verb are the fields of its dataclasses, under the same names in a YAML file (`--config FILE`) and as
flags; `minicpmv train VERB --help` lists them.
"""

import importlib
from types import ModuleType

import typer

from minicpmv.errors import MissingPackageError, one_line_errors


train_app = typer.Typer(help="Tune the model: supervised, preferences, rewards.", no_args_is_help=True)
align_app = typer.Typer(help="Make preference pairs from the model's own answers (RLAIF-V).", no_args_is_help=True)

# The modules parse their own arguments, so that `accelerate launch -m minicpmv.train.sft` reads the same ones.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def load_verb(module: str) -> ModuleType:
    """The module of a verb, which imports the packages for training."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError("train", error.name or str(error)) from error


def add_verb(app: typer.Typer, name: str, module: str, help: str, trains: bool = True) -> None:
    def run(context: typer.Context):
        with one_line_errors():
            if trains:
                from minicpmv.train.common.names import refuse_early

                refuse_early(context.args)
            verb = load_verb(module)
        verb.main(context.args)

    app.command(name, context_settings=PASS_ON, help=help)(run)


add_verb(train_app, "sft", "minicpmv.train.sft", "Supervised fine-tuning: full, LoRA, QLoRA, DoRA.")
add_verb(train_app, "dpo", "minicpmv.train.dpo", "Direct preference optimization on pairs of answers.")
add_verb(train_app, "reward", "minicpmv.train.reward", "A visual reward model from pairs of answers.")
add_verb(train_app, "rl", "minicpmv.train.grpo", "Reinforcement learning with GRPO, thinking and fast rollouts mixed.")
add_verb(train_app, "distill", "minicpmv.train.distill", "Distillation: a smaller model learns from a larger one.")
add_verb(train_app, "merge", "minicpmv.train.merge", "Merge an adapter into its model.", trains=False)
add_verb(
    train_app, "estimate", "minicpmv.train.common.memory", "Compute the GPU memory that QLoRA takes.", trains=False
)
add_verb(align_app, "feedback", "minicpmv.train.feedback.run", "Sample answers, check their claims, choose pairs.")
