"""Muon for many small matrices: PyTorch's, with those of one shape orthogonalized together.

A small model has a hundred of them; on a GPU one after the other takes as long to start as a whole forward pass takes.
"""

from collections import defaultdict

import torch

from minicpmv.train.common.precision import fast_type


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and Nesterov momentum; its state is that of the original."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if not parameters:  # a stage in which the heads alone learn
                continue
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            alike = defaultdict(list)
            for parameter, update in zip(parameters, updates, strict=True):
                alike[parameter.shape].append((parameter, update))
            for shape, pairs in alike.items():
                directions = orthogonal(torch.stack([update for _, update in pairs]), group)
                size = -0.2 * group["lr"] * max(shape) ** 0.5  # steps as long as those of AdamW
                torch._foreach_add_([parameter for parameter, _ in pairs], list(directions.float()), alpha=size)


def orthogonal(matrices: torch.Tensor, options: dict) -> torch.Tensor:
    """[N, A, B] -> the nearest (half) orthogonal matrices, about, by Newton-Schulz iterations."""
    a, b, c = options["ns_coefficients"]
    states = matrices.to(fast_type(matrices.device))
    is_tall = states.shape[1] > states.shape[2]
    states = states.mT if is_tall else states
    states = states / states.norm(dim=(1, 2), keepdim=True).clamp(min=options["eps"])
    for _ in range(options["ns_steps"]):
        gram = states @ states.mT
        states = torch.baddbmm(states, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), states, beta=a)
    return states.mT if is_tall else states
