"""Measures training and prediction speed: `python -m experiments.benchmark` (see `__main__.py`)."""
