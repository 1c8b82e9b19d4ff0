"""Guards: what watches a run and names the culprit. See docs/reliability.md."""
