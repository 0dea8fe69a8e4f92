"""Optimizers that are given gradients."""
