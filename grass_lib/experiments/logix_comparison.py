"""The comparison with other systems: data, bank and model of GPT-2 + WikiText-2, and what has to be installed.

The model is the first one of that experiment's bank, so that LDS is measured on the same retrained models; or one of
the same shape with random weights, for whom cost and agreement are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_lib.baselines.environment import missing_baselines
from grass_lib.baselines.plan import comparison, damping_values
from grass_lib.baselines.systems import check_systems
from grass_lib.errors import UsageError
from grass_lib.experiments import gpt2_wikitext
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.gpt2_protocol import Protocol, protocol

MODELS = ("bank", "random")
EMBEDDED_KS = (256,)
"""Compressed sizes at the embedded scale: the largest one of gpt2_wikitext alone, for the sake of two minutes."""


def sizes(chosen: Protocol) -> tuple[int, ...]:
    """Compressed sizes of a layer, squares, that every system gets."""
    return EMBEDDED_KS if chosen.scale == "embedded" else chosen.ks


def blocks(chosen: Protocol, tokens: int) -> int:
    """Number of training blocks for a number of tokens; 0 tokens mean all.

    Raises:
        UsageError: There are fewer tokens than in a batch of four blocks, or more than there are.
    """
    if not tokens:
        return chosen.n_train
    count = tokens // chosen.length
    if not 4 <= count <= chosen.n_train:
        raise UsageError(
            f"tokens is {tokens}, which are {count} blocks of {chosen.length}; expected 0 (all) or {4 * chosen.length} "
            f"to {chosen.n_train * chosen.length}"
        )
    return count


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs; what is not installed is for `check`.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work.
    """
    chosen = protocol(scale, n_lds=parameters["n_lds_models"], data=parameters["data"], base=parameters["base"])
    if parameters["model"] not in MODELS:
        raise UsageError(f"model is {parameters['model']!r}; expected one of {', '.join(MODELS)}")
    if parameters["batch_size"] < 1:
        raise UsageError(f"batch_size is {parameters['batch_size']}; expected 1 or more blocks")
    blocks(chosen, parameters["tokens"])
    check_systems(parameters["systems"])
    grid = damping_values(parameters["dampings"], chosen.damping_grid())
    comparison(sizes(chosen), grid, specs=parameters["specs"])
    if parameters["specs"]:
        chosen.compressions(parameters["specs"])
    resolve_device(parameters["device"])


def check(scale: str) -> list[str]:
    """Why no run would work here at a scale: what gpt2_wikitext lacks, and the other systems' venv."""
    problems = gpt2_wikitext.check(scale)
    missing = missing_baselines()
    return [missing, *problems] if missing else problems


def data_fingerprint(scale: str) -> str:
    """That of GPT-2 + WikiText-2."""
    return gpt2_wikitext.data_fingerprint(scale)
