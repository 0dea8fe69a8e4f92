"""Objectives that are environments.

`brax.make` and `gymnax.make` make the objective of a policy in an environment, `rollout.Task` in any other;
`functions` has test functions. Importing this package imports neither Brax nor Gymnax.
"""
