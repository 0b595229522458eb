"""Checkpoints in and out: Orbax, Hugging Face LLaVA, original share4v."""
