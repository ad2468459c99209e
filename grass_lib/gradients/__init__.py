"""Per-sample gradients, streamed into projectors."""

from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.full import PerSampleGradients
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import causal_loss, causal_margin
from grass_lib.gradients.layers import find_layers
from grass_lib.gradients.masked import MaskedGradients
from grass_lib.gradients.outputs import Batch, Output, cross_entropy, margin, margin_weight
from grass_lib.gradients.state import Checkpoint, ModelState, ParameterFilter
from grass_lib.gradients.stream import PassTimings, project_loader

__all__ = [
    "Batch",
    "Checkpoint",
    "FactoredGradients",
    "MaskedGradients",
    "ModelState",
    "Output",
    "ParameterFilter",
    "PassTimings",
    "PerSampleGradients",
    "causal_loss",
    "causal_margin",
    "chunked_causal_loss",
    "cross_entropy",
    "find_layers",
    "margin",
    "margin_weight",
    "project_loader",
]
