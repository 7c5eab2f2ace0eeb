"""The exponential moving average of the weights: ``average += (1 - decay) * (weights - average)``.

It lives beside the model, never in it: a preview samples from the average's own denoiser, so training cannot notice
(trap E1). The average is float32 whatever the type of the weights; in bfloat16, which has 8 bits, a decay of 0.9999
would never move it (trap P4).
"""

from __future__ import annotations

import copy

import torch

from ..denoiser import Denoiser
from .engine import local


class EMA:
    """The average of a denoiser's weights, as a denoiser of its own.

    Attributes:
        denoiser: float32, in evaluation mode, without gradients; its buffers are those of the model.
    """

    def __init__(self, model: Denoiser) -> None:
        self.denoiser = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.attach(model)

    @torch.no_grad()
    def attach(self, model: Denoiser) -> None:
        """Follow the weights of ``model`` from now on; of divided tensors, this process's slices."""
        self._averages = [local(average) for average in self.denoiser.parameters()]
        self._weights = [local(weight) for weight in model.parameters()]
        self._buffers = list(zip(self.denoiser.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One step towards the model's present weights; ``decay`` in [0, 1) is the factor on the old average."""
        weights = [w if w.dtype == torch.float32 else w.float() for w in self._weights]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)
        for average, buffer in self._buffers:
            average.copy_(buffer)
