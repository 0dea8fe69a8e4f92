"""Zeroth-order estimators: optimizers that know the slope along a few random directions only."""
