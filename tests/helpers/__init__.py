"""Shared by tests: small sources, stores, run directories and whole runs of the commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
