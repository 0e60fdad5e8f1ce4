"""Scheduling and running of steps: queues, KV blocks, prefill and decode steps, sampling and the parent's loop."""
