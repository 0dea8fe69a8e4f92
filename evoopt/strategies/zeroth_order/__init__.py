"""Zeroth-order estimators: optimizers that know only the slopes along a few random directions."""
