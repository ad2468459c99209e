"""Seeds as users give them."""

from __future__ import annotations

from grass_lib.errors import UsageError


def check_seed(seed: object, name: str = "seed") -> None:
    """Refuses what is no seed.

    Args:
        seed: As a user gave it.
        name: How the user named it, for the message.

    Raises:
        UsageError: It is no whole number from 0 to 2**63 - 1.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UsageError(f"{name} is {seed!r}; expected a whole number from 0 to 2**63 - 1")
