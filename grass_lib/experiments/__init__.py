"""The experiments of the paper, in its order. A new one is one module, one notebook and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from grass_lib.experiments.base import AttributionTask, Experiment

_SHARED = (
    "grass_lib.specs",
    "grass_lib.rng",
    "grass_lib.projection",
    "grass_lib.kernels",
    "grass_lib.gradients",
    "grass_lib.attribution",
    "grass_lib.precision",
)


def _mlp_mnist_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.mlp_mnist").data_fingerprint(scale)


def _mlp_mnist_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.mlp_mnist").check(scale)


def _mlp_mnist_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.mlp_mnist").validate(scale, parameters)


def _mlp_masks_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.mlp_masks").data_fingerprint(scale)


def _mlp_masks_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.mlp_masks").check(scale)


def _mlp_masks_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.mlp_masks").validate(scale, parameters)


def _resnet9_cifar2_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.resnet9_cifar2").data_fingerprint(scale)


def _resnet9_cifar2_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.resnet9_cifar2").check(scale)


def _resnet9_cifar2_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.resnet9_cifar2").validate(scale, parameters)


def _gpt2_wikitext_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.gpt2_wikitext").data_fingerprint(scale)


def _gpt2_wikitext_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.gpt2_wikitext").check(scale)


def _gpt2_wikitext_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.gpt2_wikitext").validate(scale, parameters)


def _gpt2_wikitext_task(scale: str, parameters: Mapping[str, Any], device: str) -> AttributionTask:
    return import_module("grass_lib.experiments.gpt2_wikitext").task(scale, parameters, device)


def _llama3_openwebtext_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.llama3_openwebtext").data_fingerprint(scale)


def _llama3_openwebtext_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.llama3_openwebtext").check(scale)


def _llama3_openwebtext_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.llama3_openwebtext").validate(scale, parameters)


def _llama3_openwebtext_task(scale: str, parameters: Mapping[str, Any], device: str) -> AttributionTask:
    return import_module("grass_lib.experiments.llama3_openwebtext").task(scale, parameters, device)


def _musictransformer_maestro_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.musictransformer_maestro").data_fingerprint(scale)


def _musictransformer_maestro_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.musictransformer_maestro").check(scale)


def _musictransformer_maestro_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.musictransformer_maestro").validate(scale, parameters)


def _logix_comparison_fingerprint(scale: str) -> str:
    return import_module("grass_lib.experiments.logix_comparison").data_fingerprint(scale)


def _logix_comparison_check(scale: str) -> list[str]:
    return import_module("grass_lib.experiments.logix_comparison").check(scale)


def _logix_comparison_validate(scale: str, parameters: Mapping[str, Any]) -> None:
    import_module("grass_lib.experiments.logix_comparison").validate(scale, parameters)


# The modules of an experiment are imported only when it is asked for something, so that the command line starts
# quickly.
EXPERIMENTS: dict[str, Experiment] = {
    "mlp_mnist": Experiment(
        name="mlp_mnist",
        title="MLP + MNIST",
        notebook="mlp_mnist.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.evaluation",
            "grass_lib.experiments.mlp_mnist",
            "grass_lib.experiments.mlp_trainer",
            "grass_lib.experiments.training",
            "grass_lib.experiments.models.mlp",
            "grass_lib.experiments.data.mnist",
            "grass_lib.experiments.data.sources",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_mlp_mnist_fingerprint,
        check=_mlp_mnist_check,
        validate=_mlp_mnist_validate,
    ),
    "resnet9_cifar2": Experiment(
        name="resnet9_cifar2",
        title="ResNet-9 + CIFAR-2",
        notebook="resnet9_cifar2.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.masks",
            "grass_lib.evaluation",
            "grass_lib.experiments.resnet9_cifar2",
            "grass_lib.experiments.resnet9_masks",
            "grass_lib.experiments.resnet9_protocol",
            "grass_lib.experiments.resnet9_trainer",
            "grass_lib.experiments.sgd_step",
            "grass_lib.experiments.mlp_trainer",
            "grass_lib.experiments.training",
            "grass_lib.experiments.models.resnet9",
            "grass_lib.experiments.data.cifar2",
            "grass_lib.experiments.data.elpv",
            "grass_lib.experiments.data.tiles",
            "grass_lib.experiments.data.sources",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_resnet9_cifar2_fingerprint,
        check=_resnet9_cifar2_check,
        validate=_resnet9_cifar2_validate,
    ),
    "musictransformer_maestro": Experiment(
        name="musictransformer_maestro",
        title="Music Transformer + MAESTRO",
        notebook="musictransformer_maestro.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.masks.energy",
            "grass_lib.evaluation",
            "grass_lib.experiments.musictransformer_maestro",
            "grass_lib.experiments.music_masks",
            "grass_lib.experiments.music_protocol",
            "grass_lib.experiments.music_trainer",
            "grass_lib.experiments.reproducible",
            "grass_lib.experiments.training",
            "grass_lib.experiments.training_step",
            "grass_lib.experiments.models.music_transformer",
            "grass_lib.experiments.data.archive",
            "grass_lib.experiments.data.chorales",
            "grass_lib.experiments.data.events",
            "grass_lib.experiments.data.maestro",
            "grass_lib.experiments.data.maestro_archive",
            "grass_lib.experiments.data.midi",
            "grass_lib.experiments.data.musicxml",
            "grass_lib.experiments.data.piece_cache",
            "grass_lib.experiments.data.sources",
            "grass_lib.experiments.data.windows",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_musictransformer_maestro_fingerprint,
        check=_musictransformer_maestro_check,
        validate=_musictransformer_maestro_validate,
    ),
    "gpt2_wikitext": Experiment(
        name="gpt2_wikitext",
        title="GPT-2 small + WikiText-2",
        notebook="gpt2_wikitext.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.masks",
            "grass_lib.store",
            "grass_lib.evaluation",
            "grass_lib.experiments.gpt2_wikitext",
            "grass_lib.experiments.gpt2_banks",
            "grass_lib.experiments.gpt2_protocol",
            "grass_lib.experiments.gpt2_trainer",
            "grass_lib.experiments.layer_masks",
            "grass_lib.experiments.reproducible",
            "grass_lib.experiments.training",
            "grass_lib.experiments.training_step",
            "grass_lib.experiments.models.gpt2",
            "grass_lib.experiments.data.blocks",
            "grass_lib.experiments.data.sources",
            "grass_lib.experiments.data.tokenizers",
            "grass_lib.experiments.data.wikipedia",
            "grass_lib.experiments.data.wikitext",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_gpt2_wikitext_fingerprint,
        check=_gpt2_wikitext_check,
        validate=_gpt2_wikitext_validate,
        attribution_task=_gpt2_wikitext_task,
    ),
    "llama3_openwebtext": Experiment(
        name="llama3_openwebtext",
        title="Llama-3.1-8B + OpenWebText",
        notebook="llama3_openwebtext.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.store",
            "grass_lib.experiments.llama3_openwebtext",
            "grass_lib.experiments.llama3_models",
            "grass_lib.experiments.llama3_protocol",
            "grass_lib.experiments.llama3_queries",
            "grass_lib.experiments.llama3_results",
            "grass_lib.experiments.models.gguf",
            "grass_lib.experiments.models.llama",
            "grass_lib.experiments.data.blocks",
            "grass_lib.experiments.data.documents",
            "grass_lib.experiments.data.openwebtext",
            "grass_lib.experiments.data.passages",
            "grass_lib.experiments.data.sources",
            "grass_lib.experiments.data.tokenizers",
            "grass_lib.experiments.data.wikipedia",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_llama3_openwebtext_fingerprint,
        check=_llama3_openwebtext_check,
        validate=_llama3_openwebtext_validate,
        attribution_task=_llama3_openwebtext_task,
    ),
    "mlp_masks": Experiment(
        name="mlp_masks",
        title="Which coordinates matter? MLP + MNIST",
        notebook="mlp_masks.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.masks",
            "grass_lib.evaluation",
            "grass_lib.experiments.mlp_masks",
            "grass_lib.experiments.mlp_mnist",
            "grass_lib.experiments.mlp_trainer",
            "grass_lib.experiments.training",
            "grass_lib.experiments.models.mlp",
            "grass_lib.experiments.data.mnist",
            "grass_lib.experiments.data.sources",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_mlp_masks_fingerprint,
        check=_mlp_masks_check,
        validate=_mlp_masks_validate,
    ),
    "logix_comparison": Experiment(
        name="logix_comparison",
        title="LogIX, dattri, bergson and kronfluence on the same work",
        notebook="logix_comparison.ipynb",
        modules=(
            *_SHARED,
            "grass_lib.store",
            "grass_lib.evaluation",
            "grass_lib.baselines",
            "grass_lib.experiments.logix_comparison",
            "grass_lib.experiments.gpt2_wikitext",
            "grass_lib.experiments.gpt2_banks",
            "grass_lib.experiments.gpt2_protocol",
            "grass_lib.experiments.gpt2_trainer",
            "grass_lib.experiments.training",
            "grass_lib.experiments.training_step",
            "grass_lib.experiments.models.gpt2",
            "grass_lib.experiments.data.blocks",
            "grass_lib.experiments.data.sources",
            "grass_lib.experiments.data.tokenizers",
            "grass_lib.experiments.data.wikipedia",
            "grass_lib.experiments.data.wikitext",
        ),
        scales=("embedded", "paper"),
        data_fingerprint=_logix_comparison_fingerprint,
        check=_logix_comparison_check,
        validate=_logix_comparison_validate,
        optional=True,
    ),
}

__all__ = ["EXPERIMENTS", "AttributionTask", "Experiment"]
