"""Starting one run as several processes: on one machine (`local.py`), on SLURM (`slurm.sbatch`)."""
