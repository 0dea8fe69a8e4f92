"""Objectives that are environments.

`brax.make` and `gymnax.make` make the objective of a policy in an environment. An environment of your own is two
functions: `rollout.Task(rollout.Environment(reset, step, observation_shape, action_size))`, see the example there.
`functions` has test functions. `coco`, `ioh`, `pymoo`, `sklearn` and `torch` make objectives of what these libraries
have. Importing this package imports none of them.
"""
