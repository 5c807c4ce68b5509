"""How fast it is: `python -m experiments.benchmark` (see `__main__.py`)."""
