"""Where workers run and how they share the device: in the caller's thread, in threads, in processes, under MPS."""
