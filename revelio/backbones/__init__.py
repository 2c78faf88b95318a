"""Backbones: every model is a thing that yields grids (b c h w) of named layers."""
