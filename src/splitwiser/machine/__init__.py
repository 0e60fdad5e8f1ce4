"""Devices, processors, memory and processes of this machine."""
