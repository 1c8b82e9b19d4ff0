"""``hymba runs``: what the run directories say, without torch and without a running process."""
