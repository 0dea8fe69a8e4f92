"""Objectives written in PyTorch: candidates go over by dlpack, gradients come back the same way.

f = torch.objective(lambda p: ((p["w"] - 3.0) ** 2).sum())
minimize(f, {"w": np.zeros(5)}, cma_es(), evaluations=1000, jit=False)
minimize(torch.with_gradient(f), {"w": np.zeros(5)}, gradient(optax.adam(0.1)), generations=100, jit=False)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.envs.libraries import load


@dataclasses.dataclass(frozen=True)
class Objective:
    """A PyTorch function as an objective in Python; see `objective`."""

    f: Callable[..., Any]
    device: str | None = None

    def tensors(self, tree: Any) -> Any:
        """The same tree of tensors, which share the arrays' memory where the devices are the same."""
        torch = load("torch", "torch")
        return jax.tree.map(lambda x: self._tensor(torch, x), tree)

    def _tensor(self, torch: Any, x: Any) -> Any:
        if isinstance(x, np.ndarray) and not x.flags.writeable:  # NumPy exports by dlpack only what may be written to
            x = jnp.asarray(x)
        tensor = torch.from_dlpack(x) if isinstance(x, (np.ndarray, jax.Array)) else torch.as_tensor(x)
        return tensor if self.device is None else tensor.to(self.device)

    def __call__(self, params: Any, *args: Any) -> Any:
        torch = load("torch", "torch")
        with torch.no_grad():
            return _number(self.f(self.tensors(params), *args))


@dataclasses.dataclass(frozen=True)
class WithGradient:
    """(value, gradient) of a PyTorch function; see `with_gradient`."""

    objective: Objective

    def __call__(self, params: Any, *args: Any) -> tuple[float, Any]:
        tensors = jax.tree.map(lambda x: x.detach().requires_grad_(True), self.objective.tensors(params))
        value = self.objective.f(tensors, *args)
        torch = load("torch", "torch")
        leaves, treedef = jax.tree.flatten(tensors)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        zero = lambda leaf: np.zeros(leaf.shape, leaf.detach().cpu().numpy().dtype)
        host = lambda grad: np.from_dlpack(grad.detach().cpu().contiguous())
        arrays = [zero(x) if grad is None else host(grad) for grad, x in zip(grads, leaves, strict=True)]
        return _number(value), treedef.unflatten(arrays)


def objective(f: Callable[..., Any], device: str | None = None) -> Objective:
    """A PyTorch function of a tree of tensors, as an objective for `minimize(..., jit=False)`.

    Args:
        f: it gets the candidate with a tensor for each array, and returns a scalar. It must not write into them.
        device: where the tensors go, such as "cuda"; None: where the arrays are, without a copy.

    Raises:
        ImportError: PyTorch is not installed.
    """
    return Objective(f, device)


def with_gradient(f: Callable[..., Any], device: str | None = None) -> WithGradient:
    """The same for strategies that ask for derivatives: it answers (value, gradient), by autograd."""
    return WithGradient(f if isinstance(f, Objective) else Objective(f, device))


def _number(value: Any) -> float:
    return float(value.detach().cpu()) if hasattr(value, "detach") else float(value)
