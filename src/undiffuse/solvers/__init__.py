"""Chapter 7. Solvers: how the estimates become a sample. One file a family; :data:`SOLVERS` is the only registry."""

from __future__ import annotations

from .adams import DEIS, IPNDM, LMS, PLMS, PNDM, DEISTime
from .base import Noise, Solver, Step
from .churn import Churn
from .consistency import Consistency
from .ddim import DDIM, DDPMLarge, DDPMLearned
from .dpm import DPMpp1, DPMpp2M, DPMpp2S, DPMpp3M, DPMpp3S, DPMSolver2, DPMSolver3
from .euler import Euler
from .exponential import ExponentialAdams
from .heun import Heun
from .runge_kutta import BogackiShampine, DormandPrince, Midpoint, RungeKutta4
from .sde import AnnealedLangevin, EulerMaruyama, PredictorCorrector
from .unipc import SASolver, UniPC

SOLVERS: dict[str, Solver] = {
    # one-step
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "rk4": RungeKutta4(),
    "rk23": BogackiShampine(),
    "rk45": DormandPrince(),
    "dpm_1": Euler(),
    "dpm_2": DPMSolver2(),
    "dpm_3": DPMSolver3(),
    "dpmpp_2s": DPMpp2S(),
    "dpmpp_3s": DPMpp3S(),
    "kdpm2": DPMSolver2(),
    # multistep
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_2m_heun": DPMpp2M(heun=True),
    "dpmpp_3m": DPMpp3M(),
    "dpmpp_3m_classic": DPMpp3M(classic=True),
    "eab_2": ExponentialAdams(2),
    "eab_3": ExponentialAdams(3),
    "eab_4": ExponentialAdams(4),
    "unipc_1": UniPC(1),
    "unipc_2": UniPC(2),
    "unipc_3": UniPC(3),
    "unipc_4": UniPC(4),
    "unipc_1_bh1": UniPC(1, bh1=True),
    "unipc_2_bh1": UniPC(2, bh1=True),
    "unipc_3_bh1": UniPC(3, bh1=True),
    "unipc_4_bh1": UniPC(4, bh1=True),
    "deis_2": DEIS(2),
    "deis_3": DEIS(3),
    "deis_4": DEIS(4),
    "deis_tab_2": DEISTime(2),
    "deis_tab_3": DEISTime(3),
    "deis_tab_4": DEISTime(4),
    "deis_rhoab_2": LMS(2),
    "deis_rhoab_3": LMS(3),
    "deis_rhoab_4": LMS(4),
    "lms_4": LMS(4),
    "ipndm_1": IPNDM(1),
    "ipndm_2": IPNDM(2),
    "ipndm_3": IPNDM(3),
    "ipndm_4": IPNDM(4),
    "plms": PLMS(),
    "pndm": PNDM(),
    # stochastic
    "ddim": DDIM(eta=0.0),
    "ddpm": DDIM(eta=1.0),
    "ddpm_large": DDPMLarge(),
    "ddpm_learned": DDPMLearned(),
    "euler_ancestral": DDIM(eta=1.0),
    "churn": Churn(),
    "dpmpp_1_sde": DPMpp1(),
    "dpmpp_2m_sde": DPMpp2M(eta=1.0),
    "dpmpp_2m_heun_sde": DPMpp2M(heun=True, eta=1.0),
    "dpmpp_3m_sde": DPMpp3M(eta=1.0),
    "dpmpp_3m_sde_classic": DPMpp3M(classic=True, eta=1.0),
    "sa_solver": SASolver(),
    "euler_maruyama": EulerMaruyama(),
    "predictor_corrector": PredictorCorrector(),
    "annealed_langevin": AnnealedLangevin(),
    # few steps, for distilled models
    "consistency": Consistency(),
    "lcm": Consistency(),
    "tcd": Consistency(gamma=0.3),
}
"""Every solver by name: the law tests, the command line and the studio read this. Equal values are equal methods."""


def solver_table() -> list[dict[str, str | int | bool]]:
    """What ``undiffuse solvers`` lists: ``name``, ``order``, ``calls_per_step`` (the least, for adaptive solvers) and
    ``stochastic`` of every solver."""
    return [
        {"name": name, "order": solver.order, "calls_per_step": solver.calls, "stochastic": solver.stochastic}
        for name, solver in SOLVERS.items()
    ]


__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "LMS",
    "PLMS",
    "PNDM",
    "SOLVERS",
    "AnnealedLangevin",
    "BogackiShampine",
    "Churn",
    "Consistency",
    "DDPMLarge",
    "DDPMLearned",
    "DEISTime",
    "DPMSolver2",
    "DPMSolver3",
    "DPMpp1",
    "DPMpp2M",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3S",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdams",
    "Heun",
    "Midpoint",
    "Noise",
    "PredictorCorrector",
    "RungeKutta4",
    "SASolver",
    "Solver",
    "Step",
    "UniPC",
    "solver_table",
]
