"""Concept steering: what a k-SAE finds, used in generation."""
