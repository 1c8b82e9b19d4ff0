"""``hymba bench``: what is fast and what is not, on the machine at hand."""
