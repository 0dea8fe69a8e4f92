"""Populations with nothing left to decode, for workers that have no JAX: the driver decodes, once."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.tree_util import Partial

from evoopt.population import Population
from evoopt.types import Params


def whole(population: Population) -> Population:
    """The same candidates as objects for objectives in Python, as by iterating."""
    made = np.empty(len(population), object)
    for i, candidate in enumerate(population.candidates(np.arange(len(population)))):
        made[i] = candidate
    return dataclasses.replace(population, decode=Partial(_itself), genomes=made)


def is_whole(population: Population) -> bool:
    """Whether there is nothing left to decode."""
    return getattr(population.decode, "func", None) is _itself


def _itself(genome: Params) -> Params:
    return genome
