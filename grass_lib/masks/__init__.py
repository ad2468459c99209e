"""Choosing the coordinates of gradients to keep: at random, by energy, by leverage, or learned (Selective Mask)."""

from grass_lib.masks.base import METHODS, fit
from grass_lib.masks.check import hard_mask_correlation
from grass_lib.masks.factored import FACTORED_METHODS, fit_factored
from grass_lib.masks.files import load_masks, save_masks
from grass_lib.masks.objective import LearnedRecipe
from grass_lib.masks.source import GradientSource

__all__ = [
    "FACTORED_METHODS",
    "METHODS",
    "GradientSource",
    "LearnedRecipe",
    "fit",
    "fit_factored",
    "hard_mask_correlation",
    "load_masks",
    "save_masks",
]
