"""Which requests share a step and when: queues, blocks, steps, sampling and the parent's loop."""
