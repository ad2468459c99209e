"""Layers for the tests of chosen entries: a module, the shape of its input behind the samples."""

from torch import nn

LAYERS = {
    "vectors": (nn.Linear(40, 33), (40,)),
    "tokens": (nn.Linear(20, 30, bias=False), (37, 20)),
    "images": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "small images": (nn.Conv2d(16, 12, 3, stride=2, padding=1, bias=False), (16, 5, 4)),
    "odd": (nn.Conv2d(8, 12, (3, 2), stride=(1, 2), dilation=(2, 1), groups=4, padding=2), (8, 9, 8)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 34, 33)),
    "line": (nn.Conv1d(4, 6, 5, stride=2), (4, 70)),
}
