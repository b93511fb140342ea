"""Reference densities, known in closed form at every noise level, and how one is fitted to data."""
