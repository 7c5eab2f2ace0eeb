"""How pictures are brought to the size that a network was trained at. The filter moves the Frechet distance by more
than many a new method does (Parmar et al. 2022, arXiv:2104.11222), so its name is part of the name of the features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, C, H, W] -> [B, C, *size]`` as TensorFlow 1 does it inside of the Inception graph of the original FID.

    Output pixel i looks at ``i * H / size[0]``, which is half a pixel off, between two neighbours only, so fine detail
    is aliased. A mistake that every published FID shares.
    """
    for axis, out in ((-2, size[0]), (-1, size[1])):
        length = x.shape[axis]
        at = torch.arange(out, dtype=torch.float64, device="cpu") * (length / out)
        low = at.floor().long().clamp(max=length - 1)
        part = (at - low).to(x.device, x.dtype).reshape(-1, *[1] * (-1 - axis))
        low, high = low.to(x.device), (low + 1).clamp(max=length - 1).to(x.device)
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), part)
    return x


def pil_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, C, H, W]`` in [0, 255] to ``[B, C, *size]`` as Pillow does it in floating point, which is clean-fid's way.

    The kernel (a = -1/2) widens with the reduction, so nothing is aliased. What overshoots [0, 255] is cut off.
    """
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


RESIZERS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "tf1-bilinear": tf1_bilinear,
    "pil-bicubic": pil_bicubic,
}
