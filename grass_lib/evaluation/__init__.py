"""Evaluation: the linear datamodeling score, its uncertainty, and the retrained models that it is measured against."""

from grass_lib.evaluation.ceiling import NoiseCeiling, noise_ceiling
from grass_lib.evaluation.damping import DampingChoice, choose_damping, split_queries
from grass_lib.evaluation.difference import LDSDifference, lds_difference
from grass_lib.evaluation.group_store import TrainedGroup
from grass_lib.evaluation.lds import LDSResult, lds
from grass_lib.evaluation.plan import BankPlan, Member
from grass_lib.evaluation.ranks import spearman
from grass_lib.evaluation.retraining import RetrainingBank, Trainer, load_weights, train_bank

__all__ = [
    "BankPlan",
    "DampingChoice",
    "LDSDifference",
    "LDSResult",
    "Member",
    "NoiseCeiling",
    "RetrainingBank",
    "TrainedGroup",
    "Trainer",
    "choose_damping",
    "lds",
    "lds_difference",
    "load_weights",
    "noise_ceiling",
    "spearman",
    "split_queries",
    "train_bank",
]
