"""Choosing the coordinates of gradients to keep: at random, by energy, by leverage, or learned (Selective Mask)."""

from grass_lib.masks.base import METHODS, fit
from grass_lib.masks.check import hard_mask_correlation
from grass_lib.masks.objective import LearnedRecipe
from grass_lib.masks.source import GradientSource

__all__ = ["METHODS", "GradientSource", "LearnedRecipe", "fit", "hard_mask_correlation"]
