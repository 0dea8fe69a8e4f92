"""Evaluation elsewhere: over devices, processes, machines, or with blocks on the host; the same bits everywhere."""

from evoopt.distributed.asynchronous import steady_state as steady_state
from evoopt.distributed.evaluator import Evaluator as Evaluator
from evoopt.distributed.local import LocalEvaluator as LocalEvaluator
from evoopt.distributed.offload import Offloaded as Offloaded
from evoopt.distributed.offload import sequential as sequential
from evoopt.distributed.ray import RayEvaluator as RayEvaluator
from evoopt.distributed.ray import ray_map as ray_map
from evoopt.distributed.scheduler import Policy as Policy
from evoopt.distributed.sharded import ShardedEvaluator as ShardedEvaluator
from evoopt.distributed.sharded import sharded_map as sharded_map

__all__ = [
    "Evaluator",
    "LocalEvaluator",
    "Offloaded",
    "Policy",
    "RayEvaluator",
    "ShardedEvaluator",
    "ray_map",
    "sequential",
    "sharded_map",
    "steady_state",
]
