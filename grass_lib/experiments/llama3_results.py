"""What the phases of the Llama experiment leave on the disk for each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.files import replacing
from grass_lib.store import GradientStore
from grass_lib.store.store import MANIFEST

GRADIENTS = "gradients"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as file:
        file.write(content)


class Results:
    """A folder for everything that belongs to one model, one set of passages and one compression.

    Attributes:
        folder: The folder.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        """Makes the folder.

        Args:
            root: Where such folders are.
            identity: JSON values that decide the gradients; other values are another folder.
        """
        text = json.dumps(dict(identity), sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_json("identity", identity)

    @property
    def gradients(self) -> Path:
        """Folder of the gradient store."""
        return self.folder / GRADIENTS

    def check_phases(self, phases: Sequence[str]) -> None:
        """Refuses phases that need gradients which are not there, before a model answers or computes anything.

        Args:
            phases: Those that are to run.

        Raises:
            UsageError: The phase ``cache`` is not among them, and has not been finished with these settings.
            StoreError: The store there is damaged.
        """
        if "cache" in phases or not {"self_influence", "attribute"} & set(phases):
            return
        there = (self.gradients / MANIFEST).is_file()
        missing = GradientStore.open(self.gradients).missing() if there else []
        if not there or missing:
            raise UsageError(
                f"the gradients of these settings are {'not finished' if there else 'not there'}; run the phase cache "
                "first, with -p phase=cache or all"
            )

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps JSON values under a name."""
        content = json.dumps(dict(value), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / f"{name}.json", content.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What was kept; None where there is nothing.

        Raises:
            DataError: The file is damaged.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path.name} in {self.folder.name} is damaged ({error}); delete it and run the phase again"
            ) from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a name."""
        from safetensors.torch import save

        write_whole(
            self.folder / f"{name}.safetensors",
            save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}),
        )

    def read_tensors(self, name: str, phase: str) -> dict[str, Tensor]:
        """Tensors that an earlier phase kept.

        Args:
            name: Theirs.
            phase: The one that makes them, for the message.

        Raises:
            UsageError: The phase has not run with these settings.
            DataError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise UsageError(
                f"there are no results of the phase {phase} with these settings; run it first, with "
                f"-p phase={phase} or all"
            )
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path.name} is damaged ({error}); run the phase {phase} again") from error
