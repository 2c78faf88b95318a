"""Diffusion models as backbones: what they share, and one file a family."""
