"""A process that computes on the CPU."""

import os

import torch


def use_all_cores(num_processes):
    """`accelerate launch` gives a process on the CPU one thread, unless told otherwise: then it gets its share."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_accelerate and num_processes == 1:
        torch.set_num_threads(os.cpu_count())
