"""What a model can do: held-out loss by domain, recall tasks, tasks of lm-evaluation-harness."""
