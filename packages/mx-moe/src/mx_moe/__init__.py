"""Mixture-of-Experts layers on microscaling weights. See the package's README."""

from .routing import Router, Routing

__all__ = [
    "Router",
    "Routing",
]
