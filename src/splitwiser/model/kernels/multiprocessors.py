"""A Triton kernel that says where it runs: what shows whether a green context keeps kernels to its multiprocessors."""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid


@triton.jit
def note_multiprocessor(numbers):
    """Write into ``numbers`` (int32, an element a program) which multiprocessor each program ran on."""
    tl.store(numbers + tl.program_id(0), smid())
