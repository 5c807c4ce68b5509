"""Shared by tests: small sources, stores, run directories and whole runs of the commands."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository

# All that a file system allows in a name: printable ASCII, other letters, a line break, a byte not UTF-8.
ODD = ''.join(map(chr, range(32, 127))).replace('/', '') + 'äß日\n' + os.fsdecode(b'\xff')
