"""Chapter 7. Solvers: how the estimates become a sample. One file a family; :data:`SOLVERS` is the only registry."""

from __future__ import annotations

from .base import Noise, Solver, Step
from .churn import Churn
from .ddim import DDIM, DDPMLarge, DDPMLearned
from .dpm import DPMpp2M
from .euler import Euler
from .heun import Heun

SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(eta=0.0),
    "ddpm": DDIM(eta=1.0),
    "ddpm_large": DDPMLarge(),
    "ddpm_learned": DDPMLearned(),
    "dpmpp_2m": DPMpp2M(),
    "churn": Churn(),
}
"""Every solver by name: the law tests, the command line and the studio read this."""

__all__ = [
    "DDIM",
    "SOLVERS",
    "Churn",
    "DDPMLarge",
    "DDPMLearned",
    "DPMpp2M",
    "Euler",
    "Heun",
    "Noise",
    "Solver",
    "Step",
]
