"""Training: schedules, one optimizer step, metrics, the loop, and :func:`.main.train` that joins them."""
