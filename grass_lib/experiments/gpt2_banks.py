"""Base model, retraining bank and checkpoint of GPT-2 + WikiText-2, each kept in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grass_lib.errors import BankError
from grass_lib.evaluation.bank_files import bank_lock, read_json, read_tensors, write_json, write_tensors
from grass_lib.evaluation.group_store import GroupStore, TrainedGroup
from grass_lib.evaluation.plan import Member
from grass_lib.evaluation.retraining import RetrainingBank, load_weights
from grass_lib.experiments.banks import bank_folder, lds_plan, trained_bank
from grass_lib.experiments.data.blocks import TextBlocks, blocks_hash
from grass_lib.experiments.gpt2_protocol import Protocol
from grass_lib.experiments.gpt2_trainer import TextTrainer, train_base, training_fingerprint, weights_hash
from grass_lib.experiments.models.gpt2 import pretrained_weights

# The model that stands in for the pretrained one is the same whatever a run's seed is.
_BASE_SEED = 0
# A checkpoint trained again may differ from the stored one by so much of the outputs' spread.
_SAME_MODEL = 0.05
# Nats by which the mean query losses of base models of one bank may differ.
_SAME_BASE = 0.01


def base_weights(
    protocol: Protocol,
    data: TextBlocks,
    directory: str | Path,
    *,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The weights that fine-tuning starts from: OpenAI's, or those of a base model, trained when it is not there yet.

    Args:
        protocol: Of the scale.
        data: Of the same protocol.
        directory: Where banks are kept; a base model has a folder of its own there.
        device: Where to train.
        compile: Compiles the training pass; None does on a GPU.
        progress: Shows a bar when it lasts.

    Raises:
        DataError: Pretrained weights cannot be had.
        BankError: The file of a base model is damaged or cannot be written.
    """
    if protocol.base == "pretrained":
        return pretrained_weights()
    name = _base_name(protocol, data, device, compile)
    folder = Path(directory) / f"base-{name[:12]}"
    weights, note = folder / "model.safetensors", folder / "model.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BankError(f"folder {folder} could not be made: {error.strerror or error}; make it writable") from error
    with bank_lock(folder):
        if not (note.is_file() and weights.is_file()):
            trained = train_base(
                data.base_ids,
                protocol.sizes,
                protocol.base_recipe,
                seed=_BASE_SEED,
                device=device,
                compile=compile,
                progress=progress,
            )
            # The checksum last: its presence means that the weights are whole.
            note.unlink(missing_ok=True)
            write_json(note, {"fingerprint": name, "sha256": write_tensors(weights, trained)})
        head = read_json(note, "delete it to train the base model again")
        return read_tensors(weights, str(head.get("sha256")), "the base model")


def train_lds_bank(
    protocol: Protocol,
    data: TextBlocks,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> RetrainingBank:
    """Trains, or finishes, the bank that LDS is measured on, and before it the base model where there is none.

    Args:
        protocol: Of the scale.
        data: Of the same protocol.
        directory: Where banks are kept, each in a folder of its own; a killed run goes on there.
        seed: Of subsets and models.
        device: Where to train.
        compile: Compiles the training pass; None does on a GPU.
        progress: Shows a bar when it lasts.

    Returns:
        The bank; ``bank.metrics`` has the models' mean query ``loss`` and ``perplexity``.

    Raises:
        DataError: Pretrained weights cannot be had.
        BankError: See `train_bank`.
    """
    start = _start(protocol, data, directory, device, compile, progress)
    plan, fingerprint = lds_plan(protocol, protocol.n_train, seed), _fingerprint(protocol, data, start, device, compile)
    trainer = _LateTrainer(data, protocol, start, device, compile)
    bank, folder = trained_bank(plan, trainer, directory, fingerprint=fingerprint, progress=progress)
    _check_one_base(bank, folder)
    return bank


def attribution_checkpoint(
    protocol: Protocol,
    data: TextBlocks,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Weights of the first model of the LDS bank, trained again from its streams when they are not on the disk.

    Args:
        protocol: Of the scale.
        data: Of the same protocol.
        directory: As for `train_lds_bank`; a bank that is not there is not trained.
        seed: Of the bank.
        device: Where to train; that of the bank.
        compile: As for the bank.
        progress: Shows a bar when it lasts.

    Returns:
        What `make_model` takes, on the CPU.

    Raises:
        DataError: Pretrained weights cannot be had.
        BankError: The model is not the one whose outputs the bank has, or as in `train_bank`.
    """
    start = _start(protocol, data, directory, device, compile, progress)
    fingerprint = _fingerprint(protocol, data, start, device, compile)
    bank_plan = lds_plan(protocol, protocol.n_train, seed)
    plan = replace(bank_plan, n_models=1, second_seed_share=0.0, group_size=1)
    trainer = _LateTrainer(data, protocol, start, device, compile)
    one, folder = trained_bank(plan, trainer, directory, fingerprint=fingerprint, keep_weights=True, progress=progress)
    stored = GroupStore(bank_folder(directory, bank_plan, fingerprint), bank_plan, fingerprint).read(0)
    if stored is not None:
        _check_same(one.outputs[0, 0], stored.outputs[0], folder)
    return load_weights(folder)[0]


@dataclass(frozen=True)
class _Start:
    """The weights that training starts from.

    Attributes:
        name: What decides them: their hash, or the recipe that they were trained by.
        load: Reads them, or trains them where they are not on the disk; called only when a model has to be trained.
    """

    name: str
    load: Callable[[], Mapping[str, Tensor]]


class _LateTrainer:
    """A trainer that gets its weights and compiles its model when the first training begins, which may be never."""

    def __init__(self, data: TextBlocks, protocol: Protocol, start: _Start, device: str, compile: bool | None) -> None:
        self._data, self._protocol, self._start = data, protocol, start
        self._options: dict[str, Any] = {"device": device, "compile": compile}
        self._trainer: TextTrainer | None = None

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        if self._trainer is None:
            sizes, recipe = self._protocol.sizes, self._protocol.recipe
            self._trainer = TextTrainer(self._data, sizes, self._start.load(), recipe, **self._options)
        return self._trainer(subsets, members)


def _start(
    protocol: Protocol,
    data: TextBlocks,
    directory: str | Path,
    device: str,
    compile: bool | None,
    progress: bool,
) -> _Start:
    if protocol.base == "pretrained":
        weights = pretrained_weights()
        return _Start(weights_hash(weights), lambda: weights)
    # Named after its recipe, not its bits: a bank whose base model was lost, or stayed on another machine, goes on.
    load = partial(base_weights, protocol, data, directory, device=device, compile=compile, progress=progress)
    return _Start(_base_name(protocol, data, device, compile), load)


def _base_name(protocol: Protocol, data: TextBlocks, device: str, compile: bool | None) -> str:
    sha = blocks_hash(data.base_ids)
    return training_fingerprint(protocol.sizes, protocol.base_recipe, sha, f"seed {_BASE_SEED}", device, compile)


def _check_one_base(bank: RetrainingBank, folder: Path) -> None:
    """Refuses a bank whose models started from base models that are not the same."""
    losses = bank.metrics["base_loss"]
    losses = losses[losses.isfinite()]
    apart = float(losses.max() - losses.min())
    if apart > _SAME_BASE:
        raise BankError(
            f"models of the bank in {folder} started from base models whose query losses are {apart:.4f} nats apart, "
            f"expected at most {_SAME_BASE}: a base model was trained again with other code, libraries or hardware; "
            "delete the folder to train the bank again"
        )


def _fingerprint(protocol: Protocol, data: TextBlocks, start: _Start, device: str, compile: bool | None) -> str:
    return training_fingerprint(protocol.sizes, protocol.recipe, data.sha256, start.name, device, compile)


def _check_same(found: Tensor, stored: Tensor, folder: Path) -> None:
    """Refuses a checkpoint that is not the model whose outputs the bank has."""
    found, stored = found.double(), stored.double()
    distance = (found - stored).square().mean().sqrt() / stored.std(correction=0).clamp_min(1e-12)
    if not float(distance) <= _SAME_MODEL:
        raise BankError(
            f"the checkpoint in {folder} is not the bank's first model: their outputs differ by {float(distance):.3f} "
            f"of their spread, expected at most {_SAME_MODEL}. The training code or its libraries have changed; delete "
            "the folders of both to train them again"
        )
