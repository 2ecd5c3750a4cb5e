"""Measuring generators and reward models on held-out photos, with intervals and baselines, and showing the result."""
