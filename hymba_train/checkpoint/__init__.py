"""Checkpoints in Megatron-Core's distributed format: save, publish, retain, load under any layout."""
