"""What parallel training moves between devices, counted: `python -m experiments.scaling`."""
