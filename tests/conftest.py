"""Makes this folder importable, so that all tests share ``zoo``; keeps tiny work on one thread, in one process."""

import os

# Compiled graphs of tests are tiny: a pool of compiling processes costs more than it saves, and can be lost.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

# Threads that wait for each other on tensors of a few kilobytes cost several times the work itself on a busy machine.
torch.set_num_threads(1)
