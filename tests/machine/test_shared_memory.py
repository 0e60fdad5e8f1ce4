"""Memory that processes share."""

from pathlib import Path

import torch
from torch import nn

from splitwiser.machine.shared_memory import SharedModule


def private_mib() -> float:
    """What this process holds of memory that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def test_what_the_weights_took_before_goes_back_to_the_system() -> None:
    module = nn.Sequential(*(nn.Linear(100, 100) for _ in range(2000)))  # of 76 MiB, in pieces that lie on the heap
    above = torch.zeros(1000)  # keeps the heap from ending where they did
    before = private_mib()
    shared = SharedModule(module, torch.device("cpu"))
    assert before - private_mib() > 60
    shared.memories[0].close()
    del above
