"""Adapters of a model, as peft saves them: LoRA, prefix tuning, prompt tuning and p-tuning."""
