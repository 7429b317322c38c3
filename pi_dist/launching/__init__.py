"""Submitting runs to SLURM."""
