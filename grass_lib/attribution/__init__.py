"""From compressed gradients to scores ``(n_train, n_query)``."""

from grass_lib.attribution.compress import compress
from grass_lib.attribution.features import FeatureAttributor
from grass_lib.attribution.gradient_similarity import GradientCosine, TracIn
from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.attribution.presets import FactGraSS, LoGra
from grass_lib.attribution.ranking import TopK, topk
from grass_lib.attribution.solve import damped_scores
from grass_lib.attribution.trak import TRAK

__all__ = [
    "TRAK",
    "FactGraSS",
    "FeatureAttributor",
    "GradientCosine",
    "InfluenceFunction",
    "LoGra",
    "TopK",
    "TracIn",
    "compress",
    "damped_scores",
    "topk",
]
