"""The five model and data pairs of the paper: what the overview page says about each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One model and data pair.

    Attributes:
        name: key used by records and by the published rows.
        model: the model in words.
        parameters: number of trainable parameters.
        data: training and query data at paper scale.
        attribution: attributor and number of models behind the scores.
        cited: keys of the bibliography for model and data.
    """

    name: str
    model: str
    parameters: int
    data: str
    attribution: str
    cited: str


PAIRS: tuple[Pair, ...] = (
    Pair(
        "mlp_mnist",
        "multilayer perceptron 784-128-64-10 with dropout",
        109_386,
        "first 5,000 training and 500 test digits of MNIST",
        "TRAK over 10 models",
        "mnist",
    ),
    Pair(
        "resnet9_cifar2",
        "residual network of a stem and three blocks, ten convolutions",
        4_825_154,
        "5,000 training and 500 test photographs of cats and dogs from CIFAR-10",
        "TRAK over 10 models",
        "cifar",
    ),
    Pair(
        "musictransformer_maestro",
        "Music Transformer, six layers",
        13_115_782,
        "5,000 windows of 256 events from the training split of MAESTRO v2, 178 windows of its test split as queries",
        "TRAK over 5 models",
        "musictransformer,maestro",
    ),
    Pair(
        "gpt2_wikitext",
        "GPT-2 small, fine-tuned",
        124_439_808,
        "4,656 training and 481 validation blocks of 512 tokens from WikiText-2",
        "influence functions with the empirical Fisher matrix, factored compression of every linear layer but the last",
        "gpt2,wikitext",
    ),
    Pair(
        "llama3_openwebtext",
        "Llama-3.1-8B-Instruct",
        8_030_261_248,
        "up to a billion tokens of OpenWebText in blocks of 1,024, twelve prompts as queries",
        "influence functions with the empirical Fisher matrix; throughput, no LDS",
        "llama3,openwebtext",
    ),
)
