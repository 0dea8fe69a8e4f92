"""Evaluation elsewhere: over several devices, or with the blocks of a model on the host, with the same bits."""

from evoopt.distributed.offload import Offloaded as Offloaded
from evoopt.distributed.offload import sequential as sequential
from evoopt.distributed.sharded import sharded_map as sharded_map

__all__ = ["Offloaded", "sequential", "sharded_map"]
