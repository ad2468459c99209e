"""Makes this folder importable, so that all tests share ``zoo``; keeps tiny work on one thread, in one process."""

import os
import signal

# Compiled graphs of tests are tiny: a pool of compiling processes costs more than it saves, and can be lost.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

# A shell in the background has it ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads that wait for each other on tensors of a few kilobytes cost several times the work itself on a busy machine.
torch.set_num_threads(1)
