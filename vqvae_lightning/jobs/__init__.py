"""Jobs: the ranks of one job, and sweeps of many jobs on one machine or a Slurm cluster."""
