"""undiffuse: diffusion models from noise to sample.

The public names, in the order of the chapters. To add one, add its line below.

Importing undiffuse imports nothing else: the lines under TYPE_CHECKING are what editors and type checkers follow, and
at run time they are the table from which a name is imported when it is first used.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    # what can go wrong
    from .errors import UndiffuseError as UndiffuseError
    from .errors import UndiffuseWarning as UndiffuseWarning

    # chapter 1
    from .levels import Estimate as Estimate
    from .levels import Level as Level
    from .levels import combine as combine

    # chapter 2
    from .schedules import SCHEDULES as SCHEDULES
    from .schedules import BetaTable as BetaTable
    from .schedules import Cosine as Cosine
    from .schedules import CosineBetas as CosineBetas
    from .schedules import EDM as EDM
    from .schedules import Flow as Flow
    from .schedules import LinearBetas as LinearBetas
    from .schedules import ScaledLinearBetas as ScaledLinearBetas
    from .schedules import Schedule as Schedule
    from .schedules import Shifted as Shifted
    from .schedules import Sigmoid as Sigmoid
    from .schedules import SubVP as SubVP
    from .schedules import VE as VE
    from .schedules import VP as VP
    from .schedules import ZeroTerminalSNR as ZeroTerminalSNR

    # chapter 3
    from .predictions import PREDICTIONS as PREDICTIONS
    from .predictions import EDMOutput as EDMOutput
    from .predictions import Eps as Eps
    from .predictions import FlowVelocity as FlowVelocity
    from .predictions import Prediction as Prediction
    from .predictions import Score as Score
    from .predictions import V as V
    from .predictions import X0 as X0

    # chapter 4
    from .denoiser import INPUT_SCALES as INPUT_SCALES
    from .denoiser import LABELS as LABELS
    from .denoiser import Denoise as Denoise
    from .denoiser import Denoiser as Denoiser
    from .denoiser import LogSigmaLabel as LogSigmaLabel
    from .denoiser import NoScale as NoScale
    from .denoiser import TimeLabel as TimeLabel
    from .denoiser import UnitVariance as UnitVariance
    from .denoiser import rescheduled as rescheduled

    # chapter 5
    from .conditions import CONDITIONS as CONDITIONS
    from .conditions import Attributes as Attributes
    from .conditions import Classes as Classes
    from .conditions import Condition as Condition
    from .conditions import Conditions as Conditions
    from .conditions import Embedded as Embedded
    from .conditions import Patches as Patches
    from .conditions import Picture as Picture
    from .conditions import Text as Text
    from .conditions import Vector as Vector

    # chapter 6
    from .guidance import autoguidance as autoguidance
    from .guidance import cfg as cfg
    from .guidance import classifier_guidance as classifier_guidance
    from .guidance import interval as interval
    from .guidance import rescale as rescale
    from .guidance import threshold as threshold

    # chapter 7
    from .solvers import DDIM as DDIM
    from .solvers import SOLVERS as SOLVERS
    from .solvers import Churn as Churn
    from .solvers import DDPMLarge as DDPMLarge
    from .solvers import DDPMLearned as DDPMLearned
    from .solvers import DPMpp2M as DPMpp2M
    from .solvers import Euler as Euler
    from .solvers import Heun as Heun
    from .solvers import Solver as Solver

    # chapter 8 (its function `sample` stays undiffuse.sampling.sample: undiffuse.sample is the verb)
    from .grids import GRIDS as GRIDS
    from .grids import Grid as Grid
    from .grids import Karras as Karras
    from .grids import Leading as Leading
    from .grids import Linspace as Linspace
    from .grids import LogSNR as LogSNR
    from .grids import Trailing as Trailing
    from .grids import Uniform as Uniform
    from .noise import Streams as Streams
    from .noise import slerp as slerp
    from .sampling import Frame as Frame
    from .sampling import trajectory as trajectory
    from .likelihood import INTEGRATORS as INTEGRATORS
    from .likelihood import Likelihood as Likelihood
    from .likelihood import log_likelihood as log_likelihood
    from .inversion import Anderson as Anderson
    from .inversion import Inversion as Inversion
    from .inversion import Newton as Newton
    from .inversion import invert as invert
    from .editing import Measurement as Measurement
    from .editing import RePaint as RePaint
    from .editing import above as above
    from .editing import below as below
    from .editing import dps as dps
    from .editing import image_to_image as image_to_image
    from .editing import interpolate as interpolate
    from .editing import keep_known as keep_known
    from .editing import paste as paste
    from .editing import pigdm as pigdm
    from .editing import spare_streams as spare_streams
    from .editing import stop_early as stop_early
    from .parallel import Parallel as Parallel
    from .parallel import sample_parallel as sample_parallel

    # chapter 9
    from .objectives import TIMES as TIMES
    from .objectives import WEIGHTS as WEIGHTS
    from .objectives import EDMWeight as EDMWeight
    from .objectives import LogitNormalTimes as LogitNormalTimes
    from .objectives import LogNormalTimes as LogNormalTimes
    from .objectives import MinSNR as MinSNR
    from .objectives import Stratified as Stratified
    from .objectives import UniformTimes as UniformTimes
    from .objectives import Unit as Unit
    from .objectives import loss as loss
    from .objectives import offset_noise as offset_noise

    # networks
    from .networks import NETWORKS as NETWORKS
    from .networks import MLP as MLP
    from .networks import AttentionMap as AttentionMap
    from .networks import DiT as DiT
    from .networks import MPUNet as MPUNet
    from .networks import UNet as UNet
    from .networks import attention_maps as attention_maps

    # data
    from .data import DATASETS as DATASETS
    from .data import DataSpec as DataSpec
    from .data import Dataset as Dataset
    from .data import from_array as from_array
    from .data import open_dataset as open_dataset

    # latents
    from .codecs import CODECS as CODECS
    from .codecs import Codec as Codec
    from .codecs import Tiling as Tiling
    from .codecs import decode_tiled as decode_tiled

    # pipeline
    from .pipeline import Pipeline as Pipeline
    from .asking import Sampling as Sampling

    # training
    from .training import RECIPES as RECIPES
    from .training import Recipe as Recipe
    from .training import Trainer as Trainer
    from .training import make_recipe as make_recipe
    from .training import run_training as run_training

    # evaluation
    from .evaluation.features import Extractor as Extractor
    from .evaluation.features import PCA as PCA
    from .evaluation.features import Features as Features
    from .evaluation.features import Identity as Identity
    from .evaluation.inception import Inception as Inception
    from .evaluation.learned import LearnedAutoencoder as LearnedAutoencoder
    from .evaluation.learned import LearnedClassifier as LearnedClassifier
    from .evaluation.pretrained import CLIP as CLIP
    from .evaluation.pretrained import DINOv2 as DINOv2
    from .evaluation.extraction import FEATURES as FEATURES
    from .evaluation.extraction import extract as extract
    from .evaluation.extraction import make_features as make_features
    from .evaluation.extraction import reference_features as reference_features
    from .evaluation.pretrained import text_features as text_features
    from .evaluation.statistics import Moments as Moments
    from .evaluation.frechet import frechet as frechet
    from .evaluation.kid import kid as kid
    from .evaluation.precision_recall import precision_recall as precision_recall
    from .evaluation.classes import class_balance as class_balance
    from .evaluation.memorisation import memorisation as memorisation
    from .evaluation.metrics import METRICS as METRICS
    from .evaluation.metrics import Examples as Examples
    from .evaluation.metrics import Figure as Figure
    from .evaluation.metrics import measure as measure
    from .evaluation.evaluate import evaluate_samples as evaluate_samples
    from .evaluation.result import Evaluation as Evaluation
    from .evaluation.result import comparable as comparable
    from .evaluation.result import read_evaluation as read_evaluation

    # experiments
    from .evaluation.paired import Difference as Difference
    from .evaluation.paired import difference as difference
    from .evaluation.compare import Arm as Arm
    from .evaluation.compare import Compared as Compared
    from .evaluation.compare import arms_of as arms_of
    from .evaluation.compare import run_comparison as run_comparison
    from .evaluation.experiments import EXPERIMENTS as EXPERIMENTS
    from .evaluation.judge import Study as Study
    from .evaluation.judge import bradley_terry as bradley_terry
    from .evaluation.judge import judge_votes as judge_votes
    from .evaluation.judge import make_study as make_study

    # the verbs of the command line
    from .commands.demo import demo as demo
    from .commands.train import train as train
    from .commands.doctor import doctor as doctor
    from .commands.compare import compare as compare
    from .commands.sample import sample as sample
    from .commands.evaluate import evaluate as evaluate
    from .commands.judge import judge as judge
    from .commands.export import export as export
    from .commands.push import push as push
    from .commands.pull import pull as pull
    from .commands.ls import ls as ls
    from .commands.show import show as show


def _table() -> dict[str, str]:
    """Public name -> the module that defines it, read from the lines above."""
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    lines = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{__name__}.{line.module}" for line in lines for alias in line.names}


_HOME = _table()
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        from difflib import get_close_matches

        near = get_close_matches(name, _HOME, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'undiffuse' has no attribute {name!r}{hint}", name=name)
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
