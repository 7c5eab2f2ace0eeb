"""Chapter 2. Schedules: how data becomes noise.

A schedule is a function from time ``t`` in [0, 1] to a level ``(t, alpha, sigma)``. An author writes
``coefficients(t) -> (alpha, sigma)`` in float64; everything else follows. All schedules start at clean data
(alpha = 1, sigma = 0 at t = 0). Three families differ only in how the pair is scaled:

    variance preserving   alpha^2 + sigma^2 = 1    DDPM, cosine, VP, sigmoid
    variance exploding    alpha = 1                VE, EDM
    flow                  alpha + sigma = 1        rectified flow, flow matching

A table of T betas is a schedule too: with alpha = cos(phi) and sigma = sin(phi), the angle phi is interpolated between
the knots t = i/T. Zero terminal SNR is phi = pi/2, a value like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import inf, pi
from typing import final

import torch
from torch import Tensor

from .errors import UndiffuseError
from .levels import Level


class Schedule(ABC):
    """Abstract: subclasses are frozen dataclasses that define :meth:`coefficients`."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` at times ``t`` (any shape, float64, in [0, 1])."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The number that divides ``(alpha, sigma)`` onto this schedule's family; default: variance preserving."""
        return torch.hypot(alpha, sigma)

    def invert(self, log_snr: Tensor) -> Tensor:
        """The time of a log-SNR that lies inside the range. Default: bisection, exact to the last bit or two of t."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(64):
            middle = (low + high) / 2
            noisier = self(middle).log_snr < log_snr
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return (low + high) / 2

    @property
    def first(self) -> float:
        """The least time at which a network is trained: 0, or 1/T for a table of T steps."""
        return 0.0

    @final
    def __call__(self, t: float | Tensor) -> Level:
        """The level at time ``t``, ``[]`` or ``[B]``; raises outside [0, 1]."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise UndiffuseError(f"time must be in [0, 1], got {t.tolist()}")
        return Level(t, *self.coefficients(t), self)

    @final
    def time_at(self, log_snr: float | Tensor) -> Tensor:
        """The time with this log-SNR; raises outside the schedule's range (never extrapolates)."""
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
        start, end = _ends(self)
        # A level computed from another schedule may miss the end by rounding; that is the end.
        slack = 1e-9
        if not bool(((log_snr <= start + slack) & (log_snr >= end - slack)).all()):
            raise UndiffuseError(
                f"log-SNR {log_snr.tolist()} is outside this schedule's range [{float(end):.4g}, {float(start):.4g}]"
            )
        log_snr = log_snr.clamp(end, start)
        t = self.invert(log_snr).clamp(0, 1)
        return torch.where(log_snr == end, 1.0, torch.where(log_snr == start, 0.0, t))

    @final
    def check(self) -> None:
        """Refuse coefficients that are no schedule: both finite and >= 0, alpha = 1 and sigma = 0 at t = 0, the log-SNR
        falling all the way."""
        level = self(torch.linspace(0, 1, 257, dtype=torch.float64))
        pair = torch.stack([level.alpha, level.sigma])
        sound = pair.isfinite().all() and (pair >= 0).all() and (level.log_snr[1:] < level.log_snr[:-1]).all()
        if not bool(sound) or pair[:, 0].tolist() != [1.0, 0.0]:
            raise UndiffuseError(
                f"{self} is not a schedule: from alpha = 1, sigma = 0 at t = 0 the signal-to-noise ratio must fall all "
                "the way to t = 1, with finite alpha and sigma, none below 0"
            )

    @final
    @property
    def terminal_snr(self) -> float:
        """``alpha^2/sigma^2`` at t = 1: the signal that is left when sampling starts from pure noise (traps S7, S8)."""
        return float(self(1.0).snr)


@lru_cache(maxsize=256)
def _ends(schedule: Schedule) -> tuple[Tensor, Tensor]:
    return schedule(0.0).log_snr, schedule(1.0).log_snr


# --- Tables: T discrete steps ---------------------------------------------------------------------------------------


class Table(Schedule):
    """Abstract: a schedule given at t = i/T for i = 1..T (Ho et al. 2020); the angle is linear between the knots."""

    @abstractmethod
    def betas(self) -> Tensor:
        """The T variances beta_1..beta_T, each in (0, 1]."""

    def angles(self) -> Tensor:
        """phi_0..phi_T with alpha_bar_i = prod(1 - beta_j) = cos^2 phi_i."""
        betas = self.betas()
        if not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
            raise UndiffuseError(
                f"{type(self).__name__} with {len(betas)} steps has betas outside (0, 1]: take more steps"
            )
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        angles = torch.atan2(torch.sqrt(-torch.expm1(log_alpha_bar)), torch.exp(log_alpha_bar / 2))
        return torch.cat([angles.new_zeros(1), angles])

    @property
    def first(self) -> float:
        return 1 / (len(_knots(self)) - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        knots = _knots(self)
        steps = len(knots) - 1
        place = t * steps
        # A time written as i/T is a knot, whatever the last bit of the division did.
        place = torch.where((place - place.round()).abs() < 1e-9, place.round(), place)
        left = place.floor().long().clamp(0, steps - 1)
        phi = torch.lerp(knots[left], knots[left + 1], place - left)
        return torch.sin(pi / 2 - phi), torch.sin(phi)  # not cos(phi): cos(pi/2) is not 0 in floating point

    def invert(self, log_snr: Tensor) -> Tensor:
        knots = _knots(self)
        phi = torch.atan(torch.exp(-log_snr / 2))
        left = (torch.searchsorted(knots, phi.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        return (left + (phi - knots[left]) / (knots[left + 1] - knots[left])) / (len(knots) - 1)


@lru_cache(maxsize=64)
def _knots(table: Table) -> Tensor:
    return table.angles()


@dataclass(frozen=True)
class LinearBetas(Table):
    """DDPM (Ho et al. 2020, arXiv:2006.11239): betas from 1e-4 to 0.02 over T = 1000 steps.

    For another number of steps the betas are scaled by 1000/T, as improved DDPM does; without that, T = 100 would keep
    60 % of the signal at the end (trap S8).
    """

    steps: int = 1000
    first_beta: float = 1e-4
    last_beta: float = 0.02

    def betas(self) -> Tensor:
        scale = 1000 / self.steps
        return torch.linspace(scale * self.first_beta, scale * self.last_beta, self.steps, dtype=torch.float64)


@dataclass(frozen=True)
class ScaledLinearBetas(Table):
    """Latent diffusion and Stable Diffusion 1.x (Rombach et al. 2022): sqrt(beta) linear from sqrt(.00085) to
    sqrt(.012)."""

    steps: int = 1000
    first_beta: float = 0.00085
    last_beta: float = 0.012

    def betas(self) -> Tensor:
        scale = 1000 / self.steps
        first, last = (scale * self.first_beta) ** 0.5, (scale * self.last_beta) ** 0.5
        return torch.linspace(first, last, self.steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class CosineBetas(Table):
    """Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17), betas clipped at 0.999 so that some signal is
    left."""

    steps: int = 1000
    s: float = 0.008
    max_beta: float = 0.999

    def betas(self) -> Tensor:
        t = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + self.s) / (1 + self.s) * pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.max_beta)


@dataclass(frozen=True)
class BetaTable(Table):
    """Any table of betas, T numbers in (0, 1]; ``BetaTable.from_alpha_bars`` takes cumulative products instead."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(beta) for beta in self.values))  # a list will do
        if not self.values or not all(0 < beta <= 1 for beta in self.values):
            raise UndiffuseError("a table of betas needs at least one number, each in (0, 1]")

    def betas(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)

    @staticmethod
    def from_alpha_bars(alpha_bars: Tensor | list[float]) -> BetaTable:
        """From alpha_bar_1..alpha_bar_T (``alphas_cumprod``), strictly decreasing, in [0, 1)."""
        bars = torch.as_tensor(alpha_bars, dtype=torch.float64)
        previous = torch.cat([bars.new_ones(1), bars[:-1]])
        return BetaTable(tuple((1 - bars / previous).tolist()))


# --- Continuous schedules -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t/2), sigma = sin(pi t/2): the cosine schedule without offset or clipping (zero terminal SNR)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(pi / 2 * (1 - t)), torch.sin(pi / 2 * t)

    def invert(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / pi)


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """Sigmoid schedule (Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972): alpha^2 falls along a
    sigmoid."""

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Differences of sigmoids from either end keep alpha exact near 1 and sigma exact near 0.
        v0, v1, v = (
            torch.sigmoid((self.start + u * (self.end - self.start)) / self.tau) for u in (t * 0, t * 0 + 1, t)
        )
        return torch.sqrt((v1 - v) / (v1 - v0)), torch.sqrt((v - v0) / (v1 - v0))

    def invert(self, log_snr: Tensor) -> Tensor:
        v0, v1 = (torch.sigmoid(torch.tensor(u / self.tau, dtype=torch.float64)) for u in (self.start, self.end))
        v = v0 + (v1 - v0) * torch.sigmoid(-log_snr)
        return (torch.logit(v) * self.tau - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class VP(Schedule):
    """The continuous variance-preserving SDE (Song et al. 2021, eq. 29-33): beta(t) linear from 0.1 to 20."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def integral(self, t: Tensor) -> Tensor:
        """``B(t)``, the integral of beta from 0 to t."""
        return t * self.beta_min + t * t * (self.beta_max - self.beta_min) / 2

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self.integral(t)
        return torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))

    def invert(self, log_snr: Tensor) -> Tensor:
        return self.time_of_integral(torch.nn.functional.softplus(-log_snr, threshold=1e3))

    def time_of_integral(self, b: Tensor) -> Tensor:
        """The t with B(t) = b: the root of a quadratic, in the form that does not cancel for small b."""
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * b))


@dataclass(frozen=True)
class SubVP(Schedule):
    """The sub-VP SDE (Song et al. 2021, eq. 29, appendix C): alpha as in VP, sigma = 1 - alpha^2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = VP(self.beta_min, self.beta_max).integral(t)
        return torch.exp(-b / 2), -torch.expm1(-b)

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha / self.alpha_of_ratio(sigma / alpha)

    @staticmethod
    def alpha_of_ratio(r: Tensor) -> Tensor:
        """alpha with (1 - alpha^2)/alpha = r, in the form that does not cancel for large r."""
        return 2 / (r + torch.sqrt(r * r + 4))

    def invert(self, log_snr: Tensor) -> Tensor:
        r = torch.exp(-log_snr / 2)
        # -log(alpha) = asinh(r/2): exact for small r as well.
        return VP(self.beta_min, self.beta_max).time_of_integral(2 * torch.asinh(r / 2))


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding SDE (Song et al. 2021, eq. 30): sigma^2 = sigma_min^2 ((sigma_max/sigma_min)^(2t) - 1).

    This is the SDE's own marginal, which is 0 at t = 0; the paper's code drops the -1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UndiffuseError(f"VE needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = torch.log(torch.tensor(self.sigma_max / self.sigma_min, dtype=torch.float64))
        return torch.ones_like(t), self.sigma_min * torch.sqrt(torch.expm1(2 * t * log_ratio))

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def invert(self, log_snr: Tensor) -> Tensor:
        log_ratio = torch.log(torch.tensor(self.sigma_max / self.sigma_min, dtype=torch.float64))
        return torch.log1p(torch.exp(-log_snr) / self.sigma_min**2) / (2 * log_ratio)


@dataclass(frozen=True)
class EDM(Schedule):
    """EDM (Karras et al. 2022, arXiv:2206.00364): alpha = 1, sigma = sigma_max t^rho, eq. 5 with sigma_min = 0."""

    sigma_max: float = 80.0
    rho: float = 7.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t**self.rho

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def invert(self, log_snr: Tensor) -> Tensor:
        return torch.exp((-log_snr / 2 - torch.log(torch.tensor(self.sigma_max, dtype=torch.float64))) / self.rho)


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow and flow matching with the straight path (arXiv:2209.03003, arXiv:2210.02747): alpha = 1 - t,
    sigma = t."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t.clone()

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma

    def invert(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


# --- Wrappers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZeroTerminalSNR(Schedule):
    """Shift and scale alpha so that none of the data is left at t = 1 (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

    alpha at the first trained level is kept. For variance-preserving schedules only.
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        middle = self.schedule(0.5)
        if abs(float(middle.alpha**2 + middle.sigma**2) - 1) > 1e-9:
            raise UndiffuseError("zero_terminal_snr needs a variance-preserving schedule (alpha^2 + sigma^2 = 1)")

    @property
    def first(self) -> float:
        return self.schedule.first

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        kept, last = float(self.schedule(self.first).alpha), float(self.schedule(1.0).alpha)
        lowered = (alpha - last) * (kept / (kept - last))
        begun = t >= self.first
        alpha = torch.where(begun, lowered, alpha)
        return alpha, torch.where(begun & (t > 0), torch.sqrt((1 - alpha) * (1 + alpha)), sigma)

    def invert(self, log_snr: Tensor) -> Tensor:
        first, last = self.schedule(self.first), self.schedule(1.0).alpha
        alpha = last + torch.sqrt(torch.sigmoid(log_snr)) * ((first.alpha - last) / first.alpha)
        inner = 2 * torch.log(alpha) - torch.log((1 - alpha) * (1 + alpha))
        return self.schedule.invert(torch.where(log_snr > first.log_snr, log_snr, inner))


@dataclass(frozen=True)
class Shifted(Schedule):
    """Every noise-to-data ratio multiplied by ``shift``: log-SNR lowered by 2 log(shift), for larger pictures.

    Simple diffusion (Hoogeboom et al. 2023, arXiv:2301.11093) for variance-preserving schedules and Stable Diffusion 3
    (Esser et al. 2024, arXiv:2403.03206, eq. 23) for flows are the same line. Shifts compose by multiplication, and
    nothing is stored that could be shifted twice (trap S9).
    """

    schedule: Schedule
    shift: float

    def __post_init__(self) -> None:
        if not 0 < self.shift < inf:
            raise UndiffuseError(f"shift must be positive, got {self.shift}")

    @property
    def first(self) -> float:
        return self.schedule.first

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        scale = self.scale(alpha, self.shift * sigma)
        return alpha / scale, self.shift * sigma / scale

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.schedule.scale(alpha, sigma)

    def invert(self, log_snr: Tensor) -> Tensor:
        return self.schedule.invert(log_snr + 2 * torch.log(torch.tensor(self.shift, dtype=torch.float64)))


SCHEDULES: dict[str, Schedule] = {
    "linear": LinearBetas(),
    "scaled_linear": ScaledLinearBetas(),
    "cosine": CosineBetas(),
    "cosine_continuous": Cosine(),
    "sigmoid": Sigmoid(),
    "vp": VP(),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "table": BetaTable((0.1, 0.2, 0.4, 0.6, 0.8, 0.9)),
    "zero_terminal_snr": ZeroTerminalSNR(LinearBetas()),
    "shifted": Shifted(Flow(), 3.0),
}
"""Every schedule by name: the law tests, the command line and saved pipelines read this."""
