"""What a running cell reports about itself, behind the bar of its notebook."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS = 0.5
_BAR = re.compile(r"^(?P<what>[^:|]{1,40}): +(?P<share>\d+%)\|")


class Followed:
    """A log that also shows the last progress bar written to it at the end of the notebook's own.

    Attributes:
        shown: What is shown now, such as ``networks 40%``.
    """

    def __init__(self, log: TextIO) -> None:
        """Takes the open log."""
        self._log, self._next = log, 0.0
        self._bars: list[Any] = []
        self.shown = ""

    def write(self, text: str) -> int:
        """Writes to the log, and looks for a bar in what is written."""
        found = next((match for line in reversed(re.split(r"[\r\n]", text)) if (match := _BAR.match(line))), None)
        if found is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            self._show(f"{found['what'].strip()} {found['share']}")
        return self._log.write(text)

    def flush(self) -> None:
        """As the log's."""
        self._log.flush()

    def _show(self, text: str) -> None:
        self.shown = text
        for bar in list(getattr(tqdm, "_instances", ())):  # papermill keeps its bar to itself
            if bar not in self._bars:
                self._bars.append(bar)
                bar.update = partial(self._next_cell, bar, bar.update)
            bar.set_postfix_str(text)

    def _next_cell(self, bar: Any, update: Any, n: float = 1) -> Any:
        """A cell has ended, and with it what it reported."""
        self.shown = ""
        bar.set_postfix_str("", refresh=False)
        return update(n)
