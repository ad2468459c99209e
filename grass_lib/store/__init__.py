"""The gradient store: compressed per-sample gradients in shards, on the disk or in memory."""

from grass_lib.errors import StoreError
from grass_lib.store.base import Store
from grass_lib.store.memory import MemoryStore
from grass_lib.store.shards import Problem
from grass_lib.store.store import GradientStore
from grass_lib.store.writer import ShardWriter

__all__ = ["GradientStore", "MemoryStore", "Problem", "ShardWriter", "Store", "StoreError"]
