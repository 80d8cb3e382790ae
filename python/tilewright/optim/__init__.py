"""Optimizers, gradient clipping and learning-rate schedules, with PyTorch's names and meanings."""

from tilewright.optim import lr_scheduler
from tilewright.optim.adam import Adam, AdamW
from tilewright.optim.clip import clip_grad_norm_, clip_grad_value_
from tilewright.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CosineSchedule,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from tilewright.optim.optimizer import Optimizer
from tilewright.optim.rmsprop import RMSprop
from tilewright.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CosineSchedule",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "Optimizer",
    "PolynomialLR",
    "RMSprop",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "clip_grad_norm_",
    "clip_grad_value_",
    "lr_scheduler",
]
