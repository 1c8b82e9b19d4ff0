"""Our implementation of Hymba for Hugging Face transformers.

``configuration_hymba.py`` and ``modeling_hymba.py`` travel inside every export: they import nothing of this package.
"""
