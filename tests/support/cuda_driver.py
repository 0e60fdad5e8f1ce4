"""A stand-in for the CUDA driver, which says what GPUs there are and can do nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

LIBCUDA = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 12 ? "NVIDIA A100 MIG 1g.5gb" : device == 11 ? "Tesla P100" : "Tesla V100", length);
    return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device, 16); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int old = device == 11;
    if (attribute == 75) *value = old ? 6 : 7;
    else if (attribute == 76) *value = 0;
    else if (attribute == 20) *value = device == 10 ? 3 : 0;
    else return 1;
    return 0;
}
int cuGetErrorString(int code, const char **said) { *said = "invalid argument"; return 0; }
"""


def put_cuda_driver(folder: Path) -> None:
    """Build a stand-in for the CUDA driver with three GPUs, ``libcuda.so.1``, into ``folder``; skip the test where there is
    no C compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    (folder / "libcuda.c").write_text(LIBCUDA)
    library, source = folder / "libcuda.so.1", folder / "libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
