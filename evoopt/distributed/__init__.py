"""Evaluation elsewhere: over devices, processes, machines; the same bits everywhere."""

from evoopt.distributed.evaluator import Evaluator as Evaluator
from evoopt.distributed.initializers import initialized as initialized
from evoopt.distributed.local import LocalEvaluator as LocalEvaluator
from evoopt.distributed.policy import Policy as Policy
from evoopt.distributed.processes import ProcessEvaluator as ProcessEvaluator
from evoopt.distributed.ray import RayEvaluator as RayEvaluator
from evoopt.distributed.ray import ray_map as ray_map
from evoopt.distributed.sharded import ShardedEvaluator as ShardedEvaluator
from evoopt.distributed.sharded import sharded_map as sharded_map
from evoopt.distributed.steady_state import steady_state as steady_state
from evoopt.distributed.threads import ThreadEvaluator as ThreadEvaluator

__all__ = [
    "Evaluator",
    "LocalEvaluator",
    "Policy",
    "ProcessEvaluator",
    "RayEvaluator",
    "ShardedEvaluator",
    "ThreadEvaluator",
    "initialized",
    "ray_map",
    "sharded_map",
    "steady_state",
]
