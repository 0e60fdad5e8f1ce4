"""AMX on any processor with AVX-512 and bfloat16: the project's functions compiled for it, its instructions emulated."""

import ctypes
from functools import cache
from pathlib import Path
from unittest.mock import patch

from splitwiser.model.kernels import build

FLAGS = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
EMULATION = Path(__file__).with_name("emulated_tiles.cpp")


@cache
def load_with_tiles() -> tuple[ctypes.CDLL | None, str]:
    """Return the functions as :func:`~splitwiser.model.kernels.build.load_native` does, with tiles: the processor's own, or
    emulated ones. None and the reason if there can be neither."""
    library, described = build.load_native()
    if library is None or library.may_use_tiles():
        return library, described
    if not library.max_small_rows():
        return None, "the functions are compiled without AVX-512's products of bfloat16 pairs"
    sources = tuple(EMULATION if source.name == "tiles.cpp" else source for source in build.SOURCES)
    with patch.object(build, "SOURCES", sources), patch.object(build, "FLAGS", (*build.FLAGS, *FLAGS)):
        return build.load_native()
