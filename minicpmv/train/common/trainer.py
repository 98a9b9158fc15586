"""What every trainer here adds to the one of TRL that it derives from: learning rates by part, a card, and no NaN on disk."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from minicpmv.train.common.card import write_card
from minicpmv.train.common.errors import TrainingError
from minicpmv.train.common.loading import trained_parameters


class TrainerMixin(Trainer):
    """`class T(TrainerMixin, SomeTrainer)`: tower, resampler and language model may have learning rates of their own, and
    weights that are not finite are never saved."""

    method = "training"  # as it reads on the card after "by"
    dataset_name: str | None = None  # for the card
    part_learning_rates: dict[str, float] = {}  # {part: rate}; the others take args.learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.part_learning_rates:
            # transformers takes groups in place of its own under the name "params".
            model = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = kind, settings | {"params": self._parameter_groups(model)}
        return super().create_optimizer(model)

    def _parameter_groups(self, model: nn.Module) -> list[dict]:
        decaying = set(self.get_decay_parameter_names(model))
        groups = []
        for part, parameters in trained_parameters(model).items():
            rate = self.part_learning_rates.get(part or "", self.args.learning_rate)
            for decay, weight_decay in ((True, self.args.weight_decay), (False, 0.0)):
                members = [parameter for name, parameter in parameters if (name in decaying) is decay]
                if members:
                    groups.append({"params": members, "lr": rate, "weight_decay": weight_decay})
        return groups

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        measures = (logs.get(name, 0.0) for name in ("loss", "grad_norm"))
        if not all(math.isfinite(value) for value in measures):  # one bad batch alone is no reason to stop
            self.check_weights()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def check_weights(self) -> None:
        """Refuse to go on with weights that are lost, before they take the place of good ones on the disk.

        Raises:
            TrainingError: some are NaN or infinite.
        """
        names, finite = [], []
        for parameters in trained_parameters(self.model).values():
            for name, parameter in parameters:
                # Of a parameter in shards: this process's.
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                names.append(name)
                finite.append(local.detach().isfinite().all())
        lost = (~torch.stack(finite)).int().to(self.accelerator.device)
        bad = self.accelerator.gather(lost[None]).any(0).nonzero()
        if len(bad):
            args = self.args
            raise TrainingError(
                f"Step {self.state.global_step}: {len(bad)} of {len(names)} trained tensors ({names[bad[0]]}, ...) hold NaN "
                f"or infinite values, and are not saved; checkpoints of earlier steps in {args.output_dir} stay. Lower "
                f"learning_rate ({args.learning_rate}), lengthen the warm-up (warmup_steps {args.warmup_steps}), clip "
                f"gradients (max_grad_norm {args.max_grad_norm}){', or take bf16 for fp16' if args.fp16 else ''}; "
                "resume_from_checkpoint: last goes on from the newest checkpoint."
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        write_card(self, self.method, self.dataset_name)
