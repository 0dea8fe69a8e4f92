"""Populations that mix, mutate and select: differential evolution, genetic algorithms, swarms, diffusion."""
