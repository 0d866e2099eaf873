"""A double of what `torch.cuda` says of a GPU, for code that measures on one: memory that is never used, and a clock
that is the CPU's."""

import time
from types import SimpleNamespace

import torch

NAME = "NVIDIA H100 80GB HBM3 (a double)"


class Event:
    """A CUDA event."""

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


PROPERTIES = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
CUDA = {
    "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda device=None: NAME,
    "Event": Event, "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0), "synchronize": lambda device=None: None,
    "empty_cache": lambda: None, "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None, "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
}  # fmt: skip


def pretend(setattr=setattr, built="13.0"):
    """Put the double in its place. built: the version of CUDA that torch says it is built for."""
    for name, said in CUDA.items():
        setattr(torch.cuda, name, said)
    setattr(torch.version, "cuda", built)
