"""Optimizers that use gradients."""
