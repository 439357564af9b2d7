"""Times and memory of one device: ours beside PEFT's."""
