"""One file per claim of the paper: its runs, and a table of the results beside the paper's numbers."""
