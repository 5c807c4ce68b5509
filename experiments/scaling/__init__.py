"""Counts what parallel training moves between devices: `python -m experiments.scaling`."""
