"""``hymba doctor``: is this machine fit to train? One page that a bug report can carry."""
