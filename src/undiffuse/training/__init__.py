"""Training: a recipe, the loop, and a run folder that can be continued at any time."""

from .checkpoint import Lock, newest, save
from .draws import batch_indices, draw
from .ema import EMA
from .proof import Proof, prove_resume
from .recipe import Averaging, Model, Objective, Optimiser, Plan, Recipe, Training
from .recipes import RECIPES, make_recipe
from .run import Progress, Result, run_training
from .trainer import Diverged, Trainer, Update

__all__ = [
    "EMA",
    "RECIPES",
    "Averaging",
    "Diverged",
    "Lock",
    "Model",
    "Objective",
    "Optimiser",
    "Plan",
    "Progress",
    "Proof",
    "Recipe",
    "Result",
    "Trainer",
    "Training",
    "Update",
    "batch_indices",
    "draw",
    "make_recipe",
    "newest",
    "prove_resume",
    "run_training",
    "save",
]
