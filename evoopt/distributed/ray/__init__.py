"""Workers as long-lived Ray actors, on this machine or on a cluster.

There is one actor a worker, and the driver has deadlines and resubmission of its own: plain Ray tasks hang for as long
as a hung node does (measured with Ray 2.60: minutes, also for fresh tasks), actors elsewhere go on. Ray is asked for
processes, for carrying bytes, and whether a process is dead; what is evaluated where, and again, is decided by
`evoopt.distributed.scheduler`.

`cluster` starts or finds Ray, `actor` runs in a worker, `executor` has the workers, `evaluator` is what users call.
Nothing here imports Ray before the first evaluation.
"""

from evoopt.distributed.ray.evaluator import RayEvaluator as RayEvaluator
from evoopt.distributed.ray.evaluator import ray_map as ray_map

__all__ = ["RayEvaluator", "ray_map"]
