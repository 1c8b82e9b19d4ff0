"""Offline tools: text in, tokenised files out. ``hymba data`` is :func:`data_prep.cli.main`."""
