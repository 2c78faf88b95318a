"""Evaluations: LLaVA-Bench (in the wild). Nothing imports this folder but its scripts and the tests."""
