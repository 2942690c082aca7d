"""Mixture-of-Experts layers on microscaling weights. See the package's README."""
