"""A search from start to end: the loop, its folder, checkpoints, curves and what is shown meanwhile."""
