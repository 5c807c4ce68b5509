"""One file per claim of the paper: its runs, and a table of the results next to the paper's numbers."""
