"""Makes this folder importable, so that all tests share ``zoo``, and keeps tiny tensors on one thread."""

import torch

# Threads that wait for each other on tensors of a few kilobytes cost several times the work itself on a busy machine.
torch.set_num_threads(1)
