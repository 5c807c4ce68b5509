"""One file per claim: what to run, and the table beside the numbers of the paper."""
