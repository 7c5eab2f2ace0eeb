"""Curves and previews for TensorBoard, if it is installed (the extra ``track``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from ..errors import UndiffuseError
from .held_out import Evaluation


@final
class TensorBoard:
    """Writes event files into ``folder``: ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise UndiffuseError(
                "--tensorboard needs the package tensorboard: pip install 'undiffuse[track]'"
            ) from None
        self.folder = folder
        self._make = SummaryWriter
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Before the first point; what earlier processes have written beyond ``step`` is hidden."""
        self._writer = self._make(str(self.folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point of each curve that has one."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def evaluation(self, row: Evaluation) -> None:
        """A point of the held-out curves."""
        values = asdict(row)
        self.scalars(row.step, {f"held_out/{name}": values[name] for name in ("raw", "ema", "error", "noise")})
        self.scalars(row.step, {f"held_out_bands/{i}": value for i, value in enumerate(row.ema_bands)})
        for probe, numbers in row.probes.items():
            self.scalars(row.step, {f"{probe}/{name}": value for name, value in numbers.items()})

    def picture(self, step: int, path: Path) -> None:
        """A preview."""
        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
