"""One folder that holds a retraining bank group by group: manifest, groups and, where wanted, weights.

::

    manifest.json               plan, fingerprint, groups, versions; written before any training
    group_000.safetensors       subset indices, outputs and metrics of the group's models
    group_000.json              checksums; written last, its presence means that the group is finished
    weights/model_000.safetensors, weights/group_000.json    likewise, where weights are kept
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import BankError, UsageError
from grass_lib.evaluation.bank_files import read_json, read_tensors, write_json, write_tensors
from grass_lib.evaluation.plan import BankPlan, Member
from grass_lib.rng import STREAM_VERSION

FORMAT = 1
_METRIC = "metric."


@dataclass(frozen=True, eq=False)
class TrainedGroup:
    """What training a group of models gives.

    Attributes:
        outputs: ``(g, n_query)``, one value per model and query, higher is better.
        state_dicts: The weights of each model, or None when they are not kept.
        metrics: Further values by name, ``(g,)`` each, for example the accuracy.
    """

    outputs: Tensor
    state_dicts: list[dict[str, Tensor]] | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


def weights_name(member: Member) -> str:
    """File name of a model's weights."""
    return f"model_{member.index:03d}{f'_seed{member.repeat}' if member.repeat else ''}.safetensors"


class GroupStore:
    """Reads and writes the groups of one bank.

    Attributes:
        folder: Where the files are.
        plan: The bank's plan.
        fingerprint: Of the plan, the recipe, the data and the random streams together.
    """

    def __init__(self, folder: Path, plan: BankPlan, recipe: str) -> None:
        """Names a store; nothing is read or written.

        Args:
            folder: Where the files are.
            plan: The bank's plan.
            recipe: The caller's fingerprint of recipe and data.
        """
        self.folder = folder
        self.plan = plan
        self.recipe = recipe
        text = json.dumps([FORMAT, STREAM_VERSION, asdict(plan), recipe], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def make_folder(self) -> None:
        """Creates the folder where it is missing.

        Raises:
            BankError: It could not be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(
                f"bank folder {self.folder} could not be made: {error.strerror or error}; name a folder that can be "
                "written"
            ) from error

    def open(self) -> None:
        """Writes the manifest, or checks that the one there is that of this bank.

        Raises:
            BankError: The folder holds another bank, or cannot be written.
        """
        path = self.folder / "manifest.json"
        if path.exists():
            self._check_manifest(read_json(path, "delete the folder to train the whole bank again"))
            return
        write_json(
            path,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "recipe": self.recipe,
                "stream_version": STREAM_VERSION,
                "plan": asdict(self.plan),
                "groups": [[member.name for member in group] for group in self.plan.groups()],
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            },
        )

    @classmethod
    def existing(cls, folder: Path) -> GroupStore:
        """The store of a folder that has a manifest.

        Raises:
            BankError: There is no valid manifest.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise BankError(
                f"{folder} has no manifest.json; expected the folder of a retraining bank. Train it again with "
                "train_bank: groups that are still there are kept"
            )
        remedy = "delete it and run the training again, groups that are still there are kept"
        manifest = read_json(path, remedy)
        try:
            plan = BankPlan(**manifest["plan"])
            store = cls(folder, plan, str(manifest["recipe"]))
        except (KeyError, TypeError, UsageError) as error:
            raise BankError(f"bank file {path} is damaged ({error}); expected the plan of a bank; {remedy}") from error
        store._check_manifest(manifest)
        return store

    def read(self, number: int) -> TrainedGroup | None:
        """Outputs and metrics of one group, checked; None when it has yet to be trained.

        Raises:
            BankError: A file is damaged or belongs to another bank.
        """
        note, path = self._paths(number)
        if not note.is_file() or not path.is_file():
            return None
        head = self._head(note, f"group {number}")
        tensors = read_tensors(path, str(head.get("sha256")), f"group {number}")
        outputs, subsets = tensors.get("outputs"), tensors.get("subsets")
        if outputs is None or subsets is None or not torch.equal(subsets, self._subsets(number)):
            raise BankError(
                f"bank file {path} does not hold the outputs and subsets of group {number}; expected those of the "
                "plan. Delete it and run again, then only this group is trained again"
            )
        metrics = {name.removeprefix(_METRIC): value for name, value in tensors.items() if name.startswith(_METRIC)}
        return TrainedGroup(outputs, metrics=metrics)

    def read_weights(self, number: int) -> list[dict[str, Tensor]] | None:
        """Weights of one group's models, checked; None when they are not, or not completely, on the disk.

        Raises:
            BankError: A file is damaged or belongs to another bank.
        """
        note = self._weights_note(number)
        if not note.is_file():
            return None
        group = f"group {number}"
        sums = self._head(note, group).get("sha256")
        paths = [note.parent / weights_name(member) for member in self.plan.groups()[number]]
        if not isinstance(sums, dict) or not all(path.is_file() and path.name in sums for path in paths):
            return None
        return [read_tensors(path, str(sums[path.name]), group) for path in paths]

    def write(self, number: int, group: TrainedGroup) -> None:
        """Writes outputs and metrics of one group, the checksum last.

        Raises:
            BankError: A file could not be written; then the group counts as not trained.
        """
        note, path = self._paths(number)
        members = self.plan.groups()[number]
        tensors = {
            "subsets": self._subsets(number),
            "seeds": torch.tensor([member.number for member in members]),
            "outputs": group.outputs,
            **{_METRIC + name: value for name, value in group.metrics.items()},
        }
        checksum = write_tensors(path, tensors)
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "members": [member.name for member in members],
            "sha256": checksum,
            "torch": torch.__version__,
        }
        write_json(note, content)

    def write_weights(self, number: int, states: list[dict[str, Tensor]]) -> None:
        """Writes the weights of one group's models, the checksums last; never touches the group's outputs.

        Raises:
            BankError: A file could not be written; then the weights count as missing.
        """
        note = self._weights_note(number)
        try:
            note.parent.mkdir(exist_ok=True)
            note.unlink(missing_ok=True)
        except OSError as error:
            raise BankError(f"bank folder {note.parent} could not be written: {error.strerror or error}") from error
        members = self.plan.groups()[number]
        sums = {
            weights_name(member): write_tensors(note.parent / weights_name(member), state)
            for member, state in zip(members, states, strict=True)
        }
        write_json(note, {"fingerprint": self.fingerprint, "sha256": sums})

    def _head(self, note: Path, group: str) -> dict[str, Any]:
        head = read_json(note, f"delete it and run again, then only {group} is trained again")
        if head.get("fingerprint") != self.fingerprint:
            raise BankError(
                f"bank file {note} belongs to another bank: its fingerprint is {head.get('fingerprint')}, expected "
                f"{self.fingerprint}; use another folder, or delete this file to train {group} again"
            )
        return head

    def _subsets(self, number: int) -> Tensor:
        """Samples of each model's subset: int64 ``(g, subset_size)``."""
        return torch.stack([self.plan.subset_indices(member.index) for member in self.plan.groups()[number]])

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"group_{number:03d}.json", self.folder / f"group_{number:03d}.safetensors"

    def _weights_note(self, number: int) -> Path:
        return self.folder / "weights" / f"group_{number:03d}.json"

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        if manifest.get("fingerprint") == self.fingerprint:
            return
        differences = []
        plan = manifest.get("plan") if isinstance(manifest.get("plan"), dict) else {}
        for item in fields(BankPlan):
            wanted, found = getattr(self.plan, item.name), (plan or {}).get(item.name)
            if found != wanted:
                differences.append(f"{item.name} is {found}, expected {wanted}")
        if manifest.get("recipe") != self.recipe:
            differences.append(f"recipe and data are {manifest.get('recipe')}, expected {self.recipe}")
        if manifest.get("stream_version") != STREAM_VERSION:
            differences.append(f"stream version is {manifest.get('stream_version')}, expected {STREAM_VERSION}")
        raise BankError(
            f"{self.folder} holds another bank: its fingerprint is {manifest.get('fingerprint')}, expected "
            f"{self.fingerprint} ({'; '.join(differences) or 'the manifest was changed'}); use another folder, or "
            "delete this one to train again"
        )
