"""A Triton kernel that records which multiprocessors it runs on, to check that a green context confines kernels to its
own."""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid


@triton.jit
def note_multiprocessor(numbers):
    """Write into ``numbers`` (int32, one element per program) which multiprocessor each program runs on."""
    tl.store(numbers + tl.program_id(0), smid())
