"""The operations that have kernels: their definitions, the noise, the language of row programs, and the backends."""
