"""Optimisers by name: torch's, and AdaBound, which it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class AdaBound(Optimizer):
    """Adam whose steps are bounded, by bounds that close in on those of plain gradient descent.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: How much of the earlier means of gradients and of their squares is kept.
        final_lr: Rate of gradient descent that the bounds end at; scaled as `lr` is by a schedule.
        gamma: How fast they close in, per step.
        eps: Added to a root, so that nothing is divided by zero.
        weight_decay: Factor of a weight that is added to its gradient.

    References:
        Luo et al. 2019, Adaptive gradient methods with dynamic bound of learning rate, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Keep the options; the rate that a schedule starts from is `lr`."""
        options = {"lr": lr, "betas": betas, "final_lr": final_lr, "gamma": gamma, "eps": eps,
                   "weight_decay": weight_decay, "base_lr": lr}  # fmt: skip
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do a step; return what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(weight)
            state["square"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (first, second) = float(state["step"]), group["betas"]
        grad = weight.grad.add(weight, alpha=group["weight_decay"])
        state["mean"].lerp_(grad, 1 - first)
        state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
        rate = group["lr"] * (1 - second**step) ** 0.5 / (1 - first**step)
        final = group["final_lr"] * group["lr"] / group["base_lr"]
        least = final * (1 - 1 / (group["gamma"] * step + 1))
        most = final * (1 + 1 / (group["gamma"] * step))
        rates = (rate / (state["square"].sqrt() + group["eps"])).clamp(least, most)
        weight.sub_(rates * state["mean"])


OPTIMIZERS = {  # name -> class
    "adabound": AdaBound, "adadelta": torch.optim.Adadelta, "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW, "asgd": torch.optim.ASGD, "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD,
}  # fmt: skip
