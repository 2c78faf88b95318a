"""LLaVA-style models with Revelio's backbones as vision towers: training, generation, compatibility."""
