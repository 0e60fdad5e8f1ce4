"""What the fork server imports before it starts workers. It alone imports this module."""

import gc
import signal
from importlib import import_module

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the server does after its imports: the parent handles Ctrl-C
gc.disable()
import_module("splitwiser.placement.worker_process")
gc.freeze()  # a worker that looked for garbage among these objects would get a copy of their pages
gc.enable()
