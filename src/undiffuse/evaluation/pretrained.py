"""DINOv2 and CLIP: features of networks that have seen millions of photographs, through transformers when installed.

Weights are a local folder or a name on the Hub, found in its cache; they are fetched only when ``download`` says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..errors import UndiffuseError, UndiffuseWarning
from .features import Extractor, Features, Pixels

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TOGETHER = 256
"""Prompts that are read at once."""


def load_pretrained(kind: str, weights: str, download: bool) -> Any:
    """``transformers.<kind>.from_pretrained(weights)``: safetensors only, and every tensor of the model must be there.

    transformers itself fills what is missing with random numbers and goes on.
    """
    try:
        import transformers
    except ImportError:
        raise UndiffuseError("these features need transformers: pip install 'undiffuse[diffusers]'") from None
    options = {"local_files_only": not download, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = getattr(transformers, kind).from_pretrained(weights, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "" if download else "; name its folder (--weights FOLDER), or allow the download (--download)"
        raise UndiffuseError(f"{weights}: cannot be loaded as a {kind} ({reason}){remedy}") from None
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise UndiffuseError(f"{weights}: not the weights of a {kind}: {len(missing)} tensors missing ({missing[0]})")
    return model.eval()


def _prepare(size: int, constants: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Pixels:
    mean, deviation = (tuple(255 * v for v in each) for each in constants)
    return Pixels((size, size), "pil-bicubic", mean, deviation)  # pyrefly: ignore


class DINOv2Network(nn.Module):
    """``[B, 3, H, W]`` to the class token of the last layer ``[B, D]``, as Stein et al. 2023 use it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.dim = model, model.config.hidden_size

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(pixel_values=x).last_hidden_state[:, 0], None


@final
@dataclass(frozen=True)
class DINOv2(Extractor):
    """Features that agree better with people than Inception's (Oquab et al. 2023; Stein et al. 2023, 2306.04675)."""

    weights: str = "facebook/dinov2-large"
    size: int = 224
    download: bool = False

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        network = DINOv2Network(load_pretrained("Dinov2Model", self.weights, self.download))
        name = f"dinov2/{os.path.basename(self.weights.rstrip('/'))}/pil-bicubic-{self.size}"
        prepare = _prepare(self.size, IMAGENET)
        return Features(name, reference.spec, prepare, network, network.dim, 32, device, {"weights": self.weights})


class CLIPNetwork(nn.Module):
    """``[B, 3, H, W]`` to image embeddings ``[B, D]``; :meth:`text` embeds prompts in the same space."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.dim = model, tokenizer, model.config.projection_dim

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output), None

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """``[N, D]``. A prompt that is too long is cut with a warning, and keeps its end token (trap V11)."""
        limit, end = self.model.config.text_config.max_position_embeddings, self.tokenizer.eos_token_id
        rows, cut = shortened(self.tokenizer(list(prompts), verbose=False)["input_ids"], limit, end)
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(prompts)} prompts have more than {limit} tokens and are cut, the first is number "
                f"{cut[0]}: CLIP does not see their ends",
                UndiffuseWarning,
                stacklevel=2,
            )
        return torch.cat([self._read(rows[i : i + TOGETHER], end) for i in range(0, len(rows), TOGETHER)])

    def _read(self, rows: Sequence[list[int]], end: int) -> Tensor:
        """Rows of tokens, filled up behind their end token."""
        longest = max(map(len, rows))
        place = self.model.logit_scale.device
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=place)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=place)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.model.text_projection(pooled).float().cpu()


def shortened(rows: Sequence[Sequence[int]], limit: int, end: int) -> tuple[list[list[int]], list[int]]:
    """Token rows of at most ``limit``, each still ending in ``end``; and the numbers of those that were cut.

    CLIP reads a sentence at its end token. A plain cut loses it, and the score falls from 26 to 17 (torchmetrics 2883).
    """
    cut = [number for number, row in enumerate(rows) if len(row) > limit]
    return [list(row) if len(row) <= limit else [*row[: limit - 1], end] for row in rows], cut


@final
@dataclass(frozen=True)
class CLIP(Extractor):
    """The image embeddings of CLIP (Radford et al. 2021).

    ``size``   to which pictures are resized; None: that of the model
    """

    weights: str = "openai/clip-vit-large-patch14"
    size: int | None = None
    download: bool = False

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        model = load_pretrained("CLIPModel", self.weights, self.download)
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.weights, local_files_only=not self.download)
        except (OSError, ValueError) as error:
            raise UndiffuseError(f"{self.weights}: no tokenizer ({' '.join(str(error).split())[:150]})") from None
        network, size = CLIPNetwork(model, tokenizer), self.size or int(model.config.vision_config.image_size)
        name = f"clip/{os.path.basename(self.weights.rstrip('/'))}/pil-bicubic-{size}"
        prepare = _prepare(size, OPENAI)
        return Features(name, reference.spec, prepare, network, network.dim, 32, device, {"weights": self.weights})


def text_features(features: Features, prompts: Sequence[str]) -> Tensor:
    """The embeddings of ``prompts`` in the space of ``features``, which :class:`CLIP` made: float32 ``[N, dim]``.

    With ``extract(features, pictures)`` they are the two sides of the CLIP score.
    """
    if not isinstance(features.network, CLIPNetwork):
        raise UndiffuseError(f"prompts need the features clip, these are {features.name}")
    if isinstance(prompts, str) or not prompts:
        raise UndiffuseError("prompts must be a list of one text or more")
    return features.network.text(prompts)
