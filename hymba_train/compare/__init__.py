"""``hymba compare``: a set of models trained on identical data, one table and plots of what came out."""
