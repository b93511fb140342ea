"""Triton kernels behind the ops of fastscore; installs as `fastscore.kernels`. Imports torch and triton only."""
