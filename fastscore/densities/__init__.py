"""Densities beside the integral: the ODE's, discrete data, transformed data, centred point clouds."""
