"""What a ``scheduler_config.json`` means: a schedule, a prediction, a label, and how to sample by default.

A scheduler of diffusers is four things in one class: how data becomes noise, what the network says, which levels are
visited and how a step is made. Its file holds options of all four, and often options of another class as well, from
which it was converted. The rule here:

    an option of its own class    is used, or checked to be what it must be, or refused by name
    an option of another class    is not its own, and is left alone (trap S14), as diffusers does
    an option of no class         is refused: it may be the one that matters

Times are continuous here and every trajectory ends at clean data, so ``set_alpha_to_one`` and ``final_sigmas_type``,
which say where to stop short of that (trap S12), change nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import torch

from ...asking import Sampling
from ...denoiser import InputScale, Label, LogSigmaLabel, NoScale, TimeLabel, UnitVariance
from ...errors import UndiffuseError, UndiffuseWarning, choose, unknown
from ...grids import Beta, Distilled, Grid, Karras, Leading, Linspace, LogSNR, ShiftedGrid, Trailing
from ...predictions import X0, EDMOutput, Eps, FlowVelocity, Prediction, V
from ...schedules import EDM, BetaTable, CosineBetas, Flow, LinearBetas, ScaledLinearBetas, Schedule, ZeroTerminalSNR
from ...solvers import (
    DDIM,
    DEIS,
    LMS,
    PLMS,
    PNDM,
    Consistency,
    DDPMLarge,
    DDPMLearned,
    DPMpp1,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    DPMSolver2,
    Euler,
    Heun,
    Solver,
    UniPC,
)

# --- The options of each class, and what they are where the file does not say -----------------------------------------

TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LATENT = TABLE | {"beta_start": 0.00085, "beta_end": 0.012}
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
LAST = {"set_alpha_to_one": True}
FLOWING = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
FINAL = {"final_sigmas_type": "zero"}
DPM = {
    **TABLE,
    **THRESHOLD,
    **SIGMAS,
    **FLOWING,
    **FINAL,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": None,  # -infinity
    "variance_type": None,
}
LCM = {
    **LATENT,
    **CLIP,
    **THRESHOLD,
    **SPACED,
    **ZERO_SNR,
    **LAST,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **TABLE,
        **CLIP,
        **THRESHOLD,
        **SPACED,
        **ZERO_SNR,
        "timestep_spacing": "leading",
        "variance_type": "fixed_small",
    },
    "DDIMScheduler": {**TABLE, **CLIP, **THRESHOLD, **SPACED, **ZERO_SNR, **LAST, "timestep_spacing": "leading"},
    "PNDMScheduler": {**TABLE, **SPACED, "timestep_spacing": "leading", "skip_prk_steps": False}
    | LAST
    | {"set_alpha_to_one": False},
    "LMSDiscreteScheduler": {**TABLE, **SPACED, **SIGMAS},
    "EulerDiscreteScheduler": {
        **TABLE,
        **SPACED,
        **SIGMAS,
        **ZERO_SNR,
        **FINAL,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    },
    "EulerAncestralDiscreteScheduler": {**TABLE, **SPACED, **ZERO_SNR},
    "HeunDiscreteScheduler": {**LATENT, **SPACED, **SIGMAS, **CLIP, "clip_sample": False},
    "KDPM2DiscreteScheduler": {**LATENT, **SPACED, **SIGMAS},
    "KDPM2AncestralDiscreteScheduler": {**LATENT, **SPACED, **SIGMAS},
    "DPMSolverMultistepScheduler": {
        **DPM,
        **SPACED,
        **ZERO_SNR,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
    },
    "DPMSolverSinglestepScheduler": {**DPM, "lower_order_final": False},
    "DPMSolverSDEScheduler": {**LATENT, **SPACED, **SIGMAS, "noise_sampler_seed": None},
    "UniPCMultistepScheduler": {
        **TABLE,
        **THRESHOLD,
        **SIGMAS,
        **FLOWING,
        **SPACED,
        **FINAL,
        **ZERO_SNR,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": {
        **TABLE,
        **THRESHOLD,
        **SIGMAS,
        **FLOWING,
        **SPACED,
        "solver_order": 2,
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "lower_order_final": True,
    },
    "EDMEulerScheduler": {
        **FINAL,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "sigma_schedule": "karras",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "LCMScheduler": LCM,
    "TCDScheduler": LCM,
}
"""The options of each class with what diffusers takes where the file does not say; a test compares them with it."""

MARKS = ("_class_name", "_diffusers_version", "_use_default_values")
OTHERS = {"class_embeddings_concat", "skip_prk_steps", "solver_kwargs", "use_empty_prompt", "algorithm"}
KNOWN = set(MARKS) | OTHERS | {key for options in DEFAULTS.values() for key in options}
NO_EFFECT = ("set_alpha_to_one", "final_sigmas_type", "lower_order_final", "euler_at_final", "timestep_scaling")
"""Own options that change nothing here: each says how to stop short of clean data, or how to get there carefully."""


# --- What it means ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """How much more noise larger pictures get: ``exp(mu)`` (or mu), mu linear in the number of tokens (Esser et al.
    2024, arXiv:2403.03206; the line is Flux's)."""

    base: float
    most: float
    base_tokens: int
    most_tokens: int
    exponential: bool

    def __call__(self, tokens: int) -> float:
        mu = self.base + (tokens - self.base_tokens) * (self.most - self.base) / (self.most_tokens - self.base_tokens)
        return exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class Meaning:
    """What a scheduler's file says, in our words.

    Attributes:
        sampling: solver and grid; steps and guidance are the family's to choose.
        threshold: what to do with x0 outside the data's range, where data have one.
        shift: of the grid with the size of the picture, for flows with dynamic shifting.
        learned_variance: the network says the variance too, and it is used.
        steps_a_step: steps that diffusers counts where ours counts one.
    """

    schedule: Schedule
    prediction: Prediction
    label: Label
    input_scale: InputScale
    solver: Solver
    grid: Grid
    threshold: str = "none"
    shift: Shift | None = None
    learned_variance: bool = False
    steps_a_step: int = 1

    def sampling(self, steps: int, guidance_scale: float, tokens: int) -> Sampling:
        """The default settings for pictures of so many tokens."""
        grid = self.grid if self.shift is None else shifted(self.grid, self.shift(tokens))
        steps = max(1, steps // self.steps_a_step)
        return Sampling(self.solver, grid, steps, guidance_scale, threshold=self.threshold)  # type: ignore[arg-type]


def shifted(grid: Grid, shift: float) -> Grid:
    """The grid with sigma/alpha times ``shift``, once (trap S9)."""
    return grid if shift == 1 else ShiftedGrid(grid, shift)


class Options:
    """The options of one scheduler, each looked at exactly once; :meth:`done` refuses those that nobody looked at."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        name = config.get("_class_name")
        if not isinstance(name, str):
            raise UndiffuseError(f"{where}: _class_name must be the name of a scheduler, not {name!r}")
        self.name, self.where = name, where
        own = choose("scheduler", self.name, DEFAULTS)
        for key in config:
            if key not in KNOWN:
                raise unknown(f"option of {where}", key, own)
        self.given = {key: value for key, value in config.items() if key in own}
        self.left = own | self.given

    def take(self, key: str, *choices: object) -> Any:
        """The value, one of ``choices`` if there are any."""
        value = self.left.pop(key)
        if choices and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in choices):
            named = " or ".join(repr(choice) for choice in choices)
            raise UndiffuseError(f"{self.where}: {key} = {value!r} cannot be read here, only {named}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.left.pop(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise UndiffuseError(f"{self.where}: {key} must be a finite number, not {value!r}")
        return float(value)

    def whole(self, key: str, least: int, most: int) -> int:
        """A whole number in a range."""
        value = self.left.pop(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UndiffuseError(f"{self.where}: {key} must be a whole number from {least} to {most}, not {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """True or false, which also where it is null."""
        return bool(self.take(key, True, False, None))

    def must(self, *settings: tuple[str, Any]) -> None:
        """Options that can have one value only, here or at all, where this class has them."""
        for key, value in settings:
            if key in self.left:
                self.take(key, value)

    def done(self) -> None:
        """Refuse what nobody looked at."""
        for key in [key for key in self.left if key not in NO_EFFECT]:
            raise UndiffuseError(f"{self.where}: {key} = {self.left[key]!r} cannot be read here; remove it")


def read_scheduler(
    config: Mapping[str, Any], where: str = "scheduler_config.json", flow_grid: Grid | None = None
) -> Meaning:
    """What a scheduler's config means. ``flow_grid``: before its shift, of a flow whose pipeline brings its own.

    Raises :class:`UndiffuseError` for a class, an option or a value that cannot be represented, by name.
    """
    options = Options(config, where)
    if options.name == "FlowMatchEulerDiscreteScheduler":
        meaning = flow(options, flow_grid)
    else:
        meaning = edm(options) if options.name == "EDMEulerScheduler" else table(options)
    options.done()
    return meaning


# --- Flows and EDM ----------------------------------------------------------------------------------------------------


def flow(options: Options, own: Grid | None) -> Meaning:
    """Flow matching: alpha = 1 - t, sigma = t, the network is told t times T and says eps - x0."""
    total = options.whole("num_train_timesteps", 1, 100_000)
    options.must(("invert_sigmas", False), ("shift_terminal", None), *[(key, False) for key in SIGMAS])
    shift = options.number("shift")
    moving = Shift(
        options.number("base_shift"),
        options.number("max_shift"),
        options.whole("base_image_seq_len", 1, 1 << 30),
        options.whole("max_image_seq_len", 1, 1 << 30),
        options.take("time_shift_type", "exponential", "linear") == "exponential",
    )
    dynamic = options.flag("use_dynamic_shifting")
    grid: Grid = own or Linspace(total, whole=False)  # from 1 to 1/T
    if dynamic and moving.base_tokens == moving.most_tokens:
        raise UndiffuseError(f"{options.where}: base_image_seq_len and max_image_seq_len must differ")
    return Meaning(
        schedule=Flow(),
        prediction=FlowVelocity(),
        label=TimeLabel(float(total)),
        input_scale=NoScale(),
        solver=Consistency() if options.flag("stochastic_sampling") else Euler(),
        grid=grid if dynamic else shifted(grid, shift),
        shift=moving if dynamic else None,
    )


def edm(options: Options) -> Meaning:
    """EDM (Karras et al. 2022): alpha = 1, and the network's F is a mixture of x0 and eps."""
    most, least = options.number("sigma_max"), options.number("sigma_min")
    data, rho = options.number("sigma_data"), options.number("rho")
    options.must(("prediction_type", "epsilon"))
    options.take("num_train_timesteps")
    karras = options.take("sigma_schedule", "karras", "exponential") == "karras"
    return Meaning(
        schedule=EDM(sigma_max=most),
        prediction=EDMOutput(data),
        label=LogSigmaLabel(0.25),
        input_scale=UnitVariance(data),
        solver=Euler(),
        grid=Karras(rho, least, most) if karras else LogSNR(least, most),
    )


# --- Tables of betas --------------------------------------------------------------------------------------------------

PREDICTED: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}


def table(options: Options) -> Meaning:
    """A table of T betas, and a network that is told the number of the step."""
    total = options.whole("num_train_timesteps", 1, 100_000)
    schedule = betas(options, total)
    if "rescale_betas_zero_snr" in options.left and options.flag("rescale_betas_zero_snr"):
        schedule = ZeroTerminalSNR(schedule)
    prediction = PREDICTED[options.take("prediction_type", *PREDICTED)]
    label: Label = TimeLabel(float(total), -1.0)
    if "timestep_type" in options.left and options.take("timestep_type", "discrete", "continuous") == "continuous":
        if not isinstance(prediction, V):
            raise UndiffuseError(f"{options.where}: timestep_type = 'continuous' goes with v_prediction only")
        label = LogSigmaLabel(0.25)
    threshold = "none"
    if "clip_sample" in options.left:
        options.must(("clip_sample_range", 1.0))
        threshold = "static" if options.flag("clip_sample") else "none"
    if "thresholding" in options.left:
        options.must(("dynamic_thresholding_ratio", 0.995), ("sample_max_value", 1.0))
        threshold = "dynamic" if options.flag("thresholding") else threshold
    options.must(*FLOWING.items())
    solver, learned, steps_a_step = SOLVER[options.name](options)
    grid = spacing(options, total)
    if schedule.terminal_snr == 0 and not isinstance(grid, (Trailing, Linspace, Karras, LogSNR, Distilled)):
        warnings.warn(
            f"{options.where}: leading spacing never shows the pure noise in which this schedule ends (trap S5): "
            "the trailing grid is taken instead",
            UndiffuseWarning,
            stacklevel=5,
        )
        grid = Trailing(total)
    return Meaning(
        schedule,
        prediction,
        label,
        NoScale(),
        solver,
        grid,
        threshold,
        learned_variance=learned,
        steps_a_step=steps_a_step,
    )


def betas(options: Options, total: int) -> Schedule:
    """The table itself; diffusers does not scale betas with the number of steps, ours are undone by 1000/T."""
    first, last = options.number("beta_start"), options.number("beta_end")
    kind = options.take("beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    trained = options.take("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or len(trained) != total or not all(type(b) in (int, float) for b in trained):
            raise UndiffuseError(f"{options.where}: trained_betas must be {total} numbers")
        return BetaTable(tuple(trained))
    if not 0 < first <= last <= 1:
        raise UndiffuseError(f"{options.where}: beta_start = {first} and beta_end = {last} must be in (0, 1], in order")
    if kind == "squaredcos_cap_v2":
        return CosineBetas(total)
    if kind == "sigmoid":
        ramp = torch.linspace(-6, 6, total, dtype=torch.float64).sigmoid()
        return BetaTable(tuple((first + ramp * (last - first)).tolist()))
    scale = total / 1000
    return (LinearBetas if kind == "linear" else ScaledLinearBetas)(total, scale * first, scale * last)


# Beyond the ends of every table: the grid then spans the table.
LEAST, MOST = 1e-6, 4096.0


def spacing(options: Options, total: int) -> Grid:
    """Which levels are visited."""
    name = options.name
    kind = (
        options.take("timestep_spacing", "leading", "trailing", "linspace")
        if "timestep_spacing" in options.left
        else "linspace"
    )
    offset = options.whole("steps_offset", 0, total - 1) if "steps_offset" in options.left else 0
    if "original_inference_steps" in options.left:
        return Distilled(total, options.whole("original_inference_steps", 1, total))
    least, most = (options.take(key) if key in options.left else None for key in ("sigma_min", "sigma_max"))
    ends = (float(least or LEAST), float(most or MOST))
    karras, exponential, beta = (options.flag(key) if key in options.left else False for key in SIGMAS)
    even = "use_lu_lambdas" in options.left and options.flag("use_lu_lambdas")
    if "interpolation_type" in options.left:
        even = options.take("interpolation_type", "linear", "log_linear") == "log_linear"
    if karras:
        return Karras(7.0, *ends)
    if exponential or even:
        return LogSNR(*ends)
    if beta:
        return Beta()
    # DPM-Solver's code counts the end point; k-diffusion's does not round.
    counts_end = name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler") or name.startswith(
        ("UniPC", "DEIS")
    )
    whole = counts_end or name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
    grids: dict[str, Grid] = {
        "leading": Leading(total, offset, counts_end),
        "trailing": Trailing(total),
        "linspace": Linspace(total, whole, counts_end),
    }
    return grids[kind]


# --- How a step is made -----------------------------------------------------------------------------------------------

Chosen = tuple[Solver, bool, int]
"""The solver, whether the learned variance is used, and steps of theirs in one of ours."""


def _ddpm(options: Options) -> Chosen:
    small, large, learned = ("fixed_small", "fixed_small_log"), ("fixed_large", "fixed_large_log"), ("learned_range",)
    kind = options.take("variance_type", *small, *large, *learned)
    solver: Solver = DDIM(eta=1.0) if kind in small else DDPMLarge() if kind in large else DDPMLearned()
    return solver, kind in learned, 1


def _pndm(options: Options) -> Chosen:
    return PLMS() if options.flag("skip_prk_steps") else PNDM(), False, 1


def _multistep(options: Options) -> Chosen:
    order, eta = _dpm(options)
    heun = options.take("solver_type", "midpoint", "heun") == "heun"
    classic = DPMpp3M(classic=True, eta=eta)  # as diffusers has it, without the factor 2
    return {1: DPMpp1(eta=eta), 2: DPMpp2M(heun=heun, eta=eta), 3: classic}[order], False, 1


def _singlestep(options: Options) -> Chosen:
    order, eta = _dpm(options)
    if eta or options.take("solver_type", "midpoint", "heun") == "heun":
        raise UndiffuseError(
            f"{options.where}: the single steps of DPM-Solver are here without noise and at the middle only; set "
            "algorithm_type to dpmsolver++ and solver_type to midpoint, or take DPMSolverMultistepScheduler"
        )
    return {1: Euler(), 2: DPMpp2S(), 3: DPMpp3S()}[order], False, order


def _dpm(options: Options) -> tuple[int, float]:
    """The order, and how much noise."""
    lowest = options.left.get("lambda_min_clipped")
    if lowest == float("-inf"):
        options.left["lambda_min_clipped"] = None
    options.must(("lambda_min_clipped", None), ("variance_type", None))
    kind = options.take("algorithm_type", "dpmsolver++", "sde-dpmsolver++")
    return options.whole("solver_order", 1, 3), 1.0 if kind.startswith("sde") else 0.0


def _unipc(options: Options) -> Chosen:
    options.must(("predict_x0", True), ("disable_corrector", []), ("solver_p", None), ("shift_terminal", None))
    order = options.whole("solver_order", 1, 4)
    return UniPC(order, bh1=options.take("solver_type", "bh1", "bh2") == "bh1"), False, 1


def _deis(options: Options) -> Chosen:
    options.must(("algorithm_type", "deis"), ("solver_type", "logrho"))
    return DEIS(options.whole("solver_order", 1, 3)), False, 1


def _nearest(solver: Solver, said: str) -> Callable[[Options], Chosen]:
    """Where the very method is not here: the model is the same, samples of it are made by another one."""

    def choose_nearest(options: Options) -> Chosen:
        options.left.pop("noise_sampler_seed", None)  # seeds are arguments here
        warnings.warn(
            f"{options.where}: the steps of {options.name} are not here; the model is as it was, and is sampled with "
            f"{said} unless you say otherwise",
            UndiffuseWarning,
            stacklevel=6,
        )
        return solver, False, 1

    return choose_nearest


def _always(solver: Solver) -> Callable[[Options], Chosen]:
    return lambda options: (solver, False, 1)


SOLVER: dict[str, Callable[[Options], Chosen]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _always(DDIM(eta=0.0)),
    "PNDMScheduler": _pndm,
    "LMSDiscreteScheduler": _always(LMS(4)),
    "EulerDiscreteScheduler": _always(Euler()),
    "EulerAncestralDiscreteScheduler": _always(DDIM(eta=1.0)),
    "HeunDiscreteScheduler": _always(Heun()),
    "KDPM2DiscreteScheduler": _always(DPMSolver2()),
    "KDPM2AncestralDiscreteScheduler": _nearest(DPMpp2M(eta=1.0), "dpmpp_2m_sde"),
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "DPMSolverSDEScheduler": _nearest(DPMpp2M(eta=1.0), "dpmpp_2m_sde"),
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "LCMScheduler": _always(Consistency()),
    "TCDScheduler": _always(Consistency(gamma=0.3)),
}
"""The solver of each class with a table."""
