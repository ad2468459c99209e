"""Variance of blocksjlt beside sjlt on MLP gradients, on random vectors and with all energy in one block; writes JSON.

python benchmarks/blocksjlt_quality.py [seeds] [output.json]
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from grass_lib.bench.quality import LIMIT, measure_quality
from grass_lib.experiments.data.mnist import load_mnist
from grass_lib.experiments.models.mlp import MLP
from grass_lib.gradients.full import PerSampleGradients
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.projection.blocksjlt import TILE

VECTORS, K = 16, 1024


def mlp_gradients() -> Tensor:
    """Gradients ``(16, 109386)`` of the MNIST MLP after a short training on the embedded digits."""
    digits = load_mnist("embedded")
    torch.manual_seed(0)
    model = MLP()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(5):
        for rows in torch.randperm(len(digits.train_x)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(digits.train_x[rows]), digits.train_y[rows]).backward()
            optimiser.step()
    rows, _ = PerSampleGradients(model, cross_entropy)(None, (digits.train_x[:VECTORS], digits.train_y[:VECTORS]))
    return rows


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    target = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/bench/blocksjlt_quality.json")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    gradients = mlp_gradients()
    p = gradients.shape[1]
    block = torch.zeros(VECTORS, p)
    block[:, 7 * TILE : 8 * TILE] = torch.randn(VECTORS, TILE, generator=generator)
    kinds = {
        "MLP gradients": gradients,
        "random vectors": torch.randn(VECTORS, p, generator=generator),
        "energy in one block": block,
    }
    lines = []
    for name, vectors in kinds.items():
        for family in ("sjlt", "blocksjlt"):
            quality = measure_quality(family, vectors, K, seeds)
            lines.append({"vectors": name, "family": family, "k": K, "p": p, "seeds": seeds, **asdict(quality)})
            print(name, family, quality, flush=True)
    result = {"limit": LIMIT, "lines": lines}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
