"""What every room uses: numbers on the host, constants that follow a device, budgets, files, progress, warnings."""
