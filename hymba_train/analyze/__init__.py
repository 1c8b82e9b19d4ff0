"""``hymba analyze``: the paper's analyses as commands, each a table, a JSON file and pictures.

What a model computes is read while the Hugging Face code runs (``record``), layer by layer, and reduced at once; no
T x T table of all heads is ever held.
"""
