"""Per-sample gradients, streamed into projectors."""

from grass_lib.gradients.full import PerSampleGradients
from grass_lib.gradients.outputs import Batch, Output, cross_entropy, margin, margin_weight
from grass_lib.gradients.state import Checkpoint, ModelState, ParameterFilter
from grass_lib.gradients.stream import PassTimings, project_loader

__all__ = [
    "Batch",
    "Checkpoint",
    "ModelState",
    "Output",
    "ParameterFilter",
    "PassTimings",
    "PerSampleGradients",
    "cross_entropy",
    "margin",
    "margin_weight",
    "project_loader",
]
