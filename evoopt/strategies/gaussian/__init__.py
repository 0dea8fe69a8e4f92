"""Gaussian search distributions: a mean, a scale for each coordinate, and slopes along random directions."""
