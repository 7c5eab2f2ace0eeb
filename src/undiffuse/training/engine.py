"""How the gradient comes about: each process computes its rows of the batch, the gradient is that of the whole batch.

The weights, the optimiser and the average are the same on every process (data parallel, torch's DDP), or each keeps a
slice of every tensor and they are put together where a layer needs them (fully sharded, torch's FSDP2). Both average
the processes' gradients while the next layer's are computed, so the loss is multiplied by their number: what is clipped
and stepped along is the gradient of the sum over the global batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compiling import for_training
from ..denoiser import Denoiser
from ..distributed import Team
from ..errors import UndiffuseError
from ..objectives import loss
from .recipe import Shard

SHARD_ABOVE = 400_000_000
"""Parameters above which ``training.shard=auto`` divides the state on GPUs: weights, gradients, AdamW's two moments and
the average take 20 bytes a parameter, 8 GB here, on each GPU otherwise."""


class Loss(nn.Module):
    """The loss of each sample as a module: DDP exchanges gradients for what passes through a module's ``forward``."""

    def __init__(self, denoiser: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.loss = loss

    def forward(self, *values: Any, **options: Any) -> Tensor:
        return self.loss(self.denoiser, *values, **options)


@dataclass(frozen=True)
class Engine:
    """How the gradient of a batch comes about.

    Attributes:
        loss: of what is trained (:func:`undiffuse.loss` of a denoiser); its backward pass leaves the mean of all
            processes' gradients.
        quiet: inside, backward passes leave the gradients at home: all parts of a batch but the last, so that there is
            one exchange an update.
    """

    loss: Callable[..., Tensor]
    quiet: Callable[[], AbstractContextManager[None]]


def check_divisible(batch_size: int, parts: int, team: Team) -> None:
    """Refuse a batch that does not have a row for every part on every process."""
    if batch_size < parts * team.size:
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise UndiffuseError(
            f"a batch of {batch_size} cannot be divided among {team.size} processes{in_parts}: raise "
            "training.batch_size (it counts the images of all processes together), or start fewer"
        )


def divides(shard: Shard, denoiser: nn.Module, team: Team, device: torch.device) -> bool:
    """Whether each process keeps a slice of the state only."""
    if team.size == 1 or shard == "never":
        return False
    return shard == "always" or (device.type != "cpu" and sum(p.numel() for p in denoiser.parameters()) > SHARD_ABOVE)


def divide(denoiser: Denoiser, device: torch.device, team: Team) -> Engine:
    """Leave each process its slice of every parameter, which becomes a DTensor: FSDP2, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (team.size,))
    lists = [module for module in denoiser.network.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for layers in lists for layer in layers if not isinstance(layer, nn.ModuleList)):
        fully_shard(layer, mesh=mesh)
    root = fully_shard(denoiser, mesh=mesh)
    register_fsdp_forward_method(denoiser, "output")

    @contextmanager
    def quiet() -> Iterator[None]:
        root.set_requires_gradient_sync(False)
        yield
        root.set_requires_gradient_sync(True)

    return Engine(partial(loss, denoiser), quiet)


def exchange(denoiser: Any, team: Team, compiled: bool = False, loss: Callable[..., Tensor] = loss) -> Engine:
    """All state on each process: DDP, or nothing at all for a team of one. ``loss(denoiser, ...)`` is ``[B]``."""
    denoiser = for_training(denoiser) if compiled else denoiser
    if team.size == 1:
        return Engine(partial(loss, denoiser), nullcontext)
    from torch.nn.parallel import DistributedDataParallel

    for name, module in denoiser.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UndiffuseError(
                f"{name} is a batch norm: its output depends on how a batch is divided among processes; use group norm"
            )
    # The gradient of a 1x1 convolution comes with the strides of channels last, which in memory are the same.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    ddp = DistributedDataParallel(Loss(denoiser, loss), gradient_as_bucket_view=True)
    return Engine(ddp, ddp.no_sync)


# --- tensors of which each process keeps a slice ----------------------------------------------------------------------


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor; without several processes nothing of torch's distributed half is loaded to find out."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor; shares its memory."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together from all processes' slices; all must ask."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
