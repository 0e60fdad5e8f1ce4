"""A stand-in for an NVIDIA GPU, so that what PyTorch for CUDA does on one can be tested without one.

The C++ sources here become ``libcuda.so.1`` and ``libcudart.so.13``, which a process loads before the real ones
(:mod:`stand_in.build`): their memory is the host's, the rules of streams, captures, green contexts and IPC hold, and kernels
do nothing. In Python, :mod:`stand_in.emulator` computes what kernels would have computed, on the CPU and over the same
memory. Allocator, graphs, processes and their handles are PyTorch's own.

The variables ``SPLITWISER_STAND_IN_FOLDER`` (where the device logs and keeps count of its memory),
``SPLITWISER_STAND_IN_DEVICES`` (how many there are) and ``SPLITWISER_STAND_IN_DELAY`` (seconds that functions take, such as
``context=2.0,cudaMalloc=0.1``) rule it; :class:`stand_in.build.StandIn`, which tests have as the fixture ``on_stand_in``,
sets them.

Attention through cuDNN, which chooses its kernels on the device, is not computed: it raises NotImplementedError.

Times and rates on it say nothing of a GPU. Its device is named as what it is, and so are the records of runs on it.
"""
