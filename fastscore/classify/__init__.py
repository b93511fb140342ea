"""The diffusion classifier: p(y | x) from paired densities, with classes eliminated at a stated error."""
