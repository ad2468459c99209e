"""Writing shards in a background thread while the next ones are computed."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.store.formats import Rows
from grass_lib.store.manifest import Manifest

logger = logging.getLogger(__name__)

_Job = tuple[int, Mapping[str, Tensor | Rows], Callable[[], None] | None]


class ShardWriter:
    """Hands finished shards to one thread; at most ``max_pending`` are unwritten when `submit` returns.

    The tensors of a submitted shard belong to the writer until ``max_pending`` further calls of `submit` have returned,
    or the writer has ended; then their memory may be used again.
    """

    def __init__(
        self,
        manifest: Manifest,
        write: Callable[[int, Mapping[str, Tensor | Rows]], None],
        *,
        max_pending: int = 1,
        worker: int = 0,
        n_workers: int = 1,
    ) -> None:
        """Starts nothing yet; see `running`.

        Args:
            manifest: The store's plan.
            write: Writes one shard.
            max_pending: Shards that may be unwritten when `submit` returns.
            worker: This worker's number.
            n_workers: Number of workers.

        Raises:
            UsageError: A number is out of range.
        """
        if max_pending < 1:
            raise UsageError(f"max_pending={max_pending} of a shard writer; expected at least 1")
        manifest.check_worker(worker, n_workers)
        self._manifest = manifest
        self._write = write
        self._max_pending = max_pending
        self._worker, self._n_workers = worker, n_workers
        self._jobs: deque[_Job | None] = deque()
        self._unwritten = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    def submit(
        self, number: int, tensors: Mapping[str, Tensor | Rows], ready: Callable[[], None] | None = None
    ) -> None:
        """Hands over a shard and waits until at most ``max_pending`` shards are unwritten, this one included.

        Args:
            number: The shard.
            tensors: ``{layer: (rows, k_l)}`` in the store's ``row_dtype`` on the CPU, or rows that are encoded already.
            ready: Called in the writer's thread before the tensors are read; it waits for whatever still fills them.

        Raises:
            UsageError: Layers, shapes, the dtype or the device differ from the plan, or the shard is another worker's.
            StoreError: An earlier shard, or this one, could not be written.
        """
        self._manifest.check_tensors(number, tensors)
        if number % self._n_workers != self._worker:
            raise UsageError(
                f"shard {number} was given to worker {self._worker} of {self._n_workers}; it is that of worker "
                f"{number % self._n_workers}"
            )
        with self._changed:
            self._raise_error()
            if self._closed:
                raise UsageError(f"shard {number} was given to a writer that has ended; submit within its block")
            self._jobs.append((number, dict(tensors), ready))
            self._unwritten += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._unwritten <= self._max_pending or self._error is not None)
            self._raise_error()

    @contextmanager
    def running(self) -> Iterator[ShardWriter]:
        """Runs the thread during a block; shards that were submitted are written before the block ends.

        Raises:
            StoreError: A shard could not be written, unless the block itself ends with an exception.
        """
        thread = threading.Thread(target=self._work, name="shard-writer", daemon=True)
        thread.start()
        try:
            yield self
        except BaseException as error:
            self._stop(thread)
            if self._error is not None and self._error is not error:
                logger.warning("a shard could not be written either: %s", self._error)
            raise
        self._stop(thread)
        self._raise_error()

    def _stop(self, thread: threading.Thread) -> None:
        with self._changed:
            self._closed = True
            self._jobs.append(None)
            self._changed.notify_all()
        thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job = self._jobs.popleft()
                failed = self._error is not None
            if job is None:
                return
            number, tensors, ready = job
            job = None
            try:
                if not failed:
                    if ready is not None:
                        ready()
                    self._write(number, tensors)
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                with self._changed:
                    self._error = error
            finally:
                # The memory is the caller's again before it hears of it.
                del tensors, ready
                with self._changed:
                    self._unwritten -= 1
                    self._changed.notify_all()
