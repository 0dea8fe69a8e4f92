"""Gaussian search distributions: a mean, a scale of each coordinate, and slopes along random directions."""
