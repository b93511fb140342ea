"""Training with the density formula."""
