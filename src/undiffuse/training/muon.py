"""Muon: the momentum of a matrix is made orthogonal before it is stepped along.

    M <- mu M + (1 - mu) G,    U = (1 - mu) G + mu M,    W <- (1 - eta lambda) W - eta 0.2 sqrt(max(m, n)) polar(U)

(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Nesterov's momentum.) ``polar(U)``, for U = P S Q^T the
matrix P Q^T, treats all directions that the gradients agree about alike, where the gradient itself is mostly a few of
them. The factor makes the entries of an update 0.2 on average (root mean square), which is about what AdamW's are (Liu
et al. 2025, arXiv:2502.16982, eq. 4), so that one learning rate serves both: what is no matrix inside the network, and
its first and last layers, go by AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import UndiffuseError
from ..networks.autoencoder import Block
from .engine import is_divided
from .recipe import Optimiser

SIZE = 0.2  # root mean square of an update's entries, in learning rates
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5


def polar(matrices: Tensor) -> Tensor:
    """``P Q^T`` of each ``P S Q^T`` in ``[..., m, n]``, roughly: singular values between about 0.7 and 1.2.

    Five steps of Newton and Schulz's iteration with Jordan's coefficients, an odd polynomial of the matrix that brings
    singular values from 0.003 to 1 near 1; much smaller ones stay small. Zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    # Every step multiplies x by a polynomial of its own x x^T, which is small: so x itself is touched but twice.
    square = x @ x.mT
    product = one = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(STEPS):
        factor = a * one + b * square + c * square @ square
        product = factor @ product
        square = factor @ square @ factor
    x = product @ x
    return x.mT if tall else x


def matrices_of(trunk: nn.Module) -> list[nn.Parameter]:
    """The weights inside a network's lists of blocks, or a codec's blocks, with two or more axes, of which the first
    counts the outputs."""
    lists = [module for module in trunk.modules() if isinstance(module, (nn.ModuleList, Block))]
    found = {id(weight): weight for each in lists for weight in each.parameters() if weight.ndim >= 2}
    return list(found.values())


@final
class Muon(torch.optim.AdamW):
    """Muon for ``matrices``, AdamW for the ``rest``, with one learning rate.

    A convolution's weight ``[out, in, *kernel]`` is the matrix ``[out, in * kernel]``. Like AdamW's kernel, a step does
    nothing where ``found_inf`` is positive, and waits for no device to know.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], *, momentum: float, **adamw: Any
    ) -> None:
        self.matrices = list(matrices)
        self.momentum = momentum
        super().__init__([*self.matrices, *rest], fused=True, **adamw)
        for weight in self.matrices:
            self.state[weight] = {"momentum": torch.zeros_like(weight)}
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [weight.grad for weight in self.matrices]
        for weight in self.matrices:
            weight.grad = None  # AdamW passes over it
        super().step()
        group = self.param_groups[0]
        lr, decay = group["lr"], group["weight_decay"]
        fine = 1 - self.found_inf  # 1, or 0 after a gradient that is not finite
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for weight, gradient in zip(self.matrices, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.nan_to_num(0, 0, 0)
                momentum = self.state[weight]["momentum"]
                momentum.lerp_(gradient, (1 - self.momentum) * fine)
                ahead = gradient.lerp(momentum, self.momentum).flatten(1)
                alike.setdefault((ahead.shape[0], ahead.shape[1]), []).append((weight, ahead))
        for shape, pairs in alike.items():  # all matrices of one shape in one product
            updates = polar(torch.stack([ahead for _, ahead in pairs]))
            size = lr * SIZE * max(shape) ** 0.5
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - lr * decay * fine).sub_(update.reshape(weight.shape) * (size * fine))


def make_optimiser(module: nn.Module, trunk: nn.Module, choice: Optimiser) -> torch.optim.AdamW:
    """What the recipe asks for, for all weights of ``module``, in whose ``trunk`` the blocks are."""
    options = {"lr": choice.lr, "betas": choice.betas, "eps": choice.eps, "weight_decay": choice.weight_decay}
    return OPTIMISERS[choice.kind](module, trunk, choice.momentum, options)


def adamw(module: nn.Module, trunk: nn.Module, momentum: float, options: dict[str, Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), fused=True, **options)


def muon(module: nn.Module, trunk: nn.Module, momentum: float, options: dict[str, Any]) -> torch.optim.AdamW:
    matrices = matrices_of(trunk)
    if not matrices:
        raise UndiffuseError("optimiser.kind=muon needs a network with blocks of layers, this one has none: say adamw")
    if any(map(is_divided, matrices)):
        raise UndiffuseError(
            "optimiser.kind=muon needs whole matrices: say training.shard=never, or optimiser.kind=adamw"
        )
    taken = set(map(id, matrices))
    rest = [weight for weight in module.parameters() if id(weight) not in taken]
    return Muon(matrices, rest, momentum=momentum, **options)


OPTIMISERS: dict[str, Callable[[nn.Module, nn.Module, float, dict[str, Any]], torch.optim.AdamW]] = {
    "adamw": adamw,
    "muon": muon,
}
"""Every optimiser by name."""

TITLES = {"adamw": "AdamW", "muon": "Muon"}
"""How they are written."""


def moments(optimiser: torch.optim.AdamW, weight: nn.Parameter) -> dict[str, Tensor]:
    """What the optimiser keeps for ``weight``: tensors of these names, shapes and types."""
    if isinstance(optimiser, Muon) and any(weight is each for each in optimiser.matrices):
        return {"momentum": weight}
    return {"step": weight.new_zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
