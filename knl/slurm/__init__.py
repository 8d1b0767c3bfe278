"""Jobs on a Slurm cluster: rendered, submitted, looked at. Their scripts are in `slurm/`."""
