"""One thread for work in small pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes with one thread, and with as many as before after it.

    For small tensors, and for matrix decompositions of a few hundred rows: they are thousands of short steps, at whose
    ends the threads wait for each other. Where other processes use the processor too, that wait is most of the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
