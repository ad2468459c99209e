"""Devices by name, checked where they are given."""

from __future__ import annotations

import torch

from grass_lib.errors import UsageError


def known_device(device: str | torch.device, *, other_names: str = "") -> torch.device:
    """A device of this machine, as it was named; a GPU is not started.

    Args:
        device: For example ``cpu``, ``cuda`` or ``cuda:1``.
        other_names: Further names that the caller takes, for the message.

    Raises:
        UsageError: There is no such device here.
    """
    expected = f"{other_names}, cpu" if other_names else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is {device!r}; expected {expected} or cuda (cuda:1 for the second GPU)") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            otherwise = f"{other_names} or cpu" if other_names else "cpu"
            raise UsageError(f"device is '{device}', but no GPU is usable here; expected {otherwise}")
        if found.index is not None and found.index >= count:
            raise UsageError(
                f"device is '{device}', but the GPUs here are cuda:0 to cuda:{count - 1}; expected one of them, or "
                f"{expected}"
            )
    return found


def usable_device(device: str | torch.device) -> torch.device:
    """A device of this machine with its index, so that it compares equal to a tensor's.

    Args:
        device: As in `known_device`.

    Raises:
        UsageError: There is no such device here, or it takes no tensor.
    """
    found = known_device(device)
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"device is '{device}', which is not usable here ({reason}); expected cpu or cuda") from error


def device_of_model(model: torch.nn.Module, device: str | torch.device | None) -> torch.device:
    """The device of a model that is computed on where it is.

    Args:
        model: The model.
        device: As it was given, only to be compared; None compares nothing.

    Raises:
        UsageError: The model has no weights, or is elsewhere.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise UsageError(f"the {type(model).__name__} has no weights; expected a model with layers to capture")
    if device is not None and usable_device(device) != first.device:
        raise UsageError(f"the model is on {first.device}, and device is {device}; move the model there first")
    return first.device
