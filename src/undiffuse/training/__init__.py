"""Training: a recipe, the loop, and a run folder that can be continued at any time."""

from .checkpoint import Lock, newest, save
from .convergence import Forecast, forecast
from .draws import batch_indices, draw
from .ema import EMA
from .held_out import Curve, Evaluation, HeldOut, Probe, divide
from .proof import Proof, prove_resume
from .recipe import Averaging, Model, Objective, Optimiser, Plan, Recipe, Training
from .recipes import RECIPES, make_recipe
from .run import Progress, Result, run_training
from .trainer import Diverged, Trainer, Update

__all__ = [
    "EMA",
    "RECIPES",
    "Averaging",
    "Curve",
    "Diverged",
    "Evaluation",
    "Forecast",
    "HeldOut",
    "Lock",
    "Model",
    "Objective",
    "Optimiser",
    "Plan",
    "Probe",
    "Progress",
    "Proof",
    "Recipe",
    "Result",
    "Trainer",
    "Training",
    "Update",
    "batch_indices",
    "divide",
    "draw",
    "forecast",
    "make_recipe",
    "newest",
    "prove_resume",
    "run_training",
    "save",
]
