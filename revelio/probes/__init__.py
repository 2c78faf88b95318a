"""Baselines beside Diff-C: zero-shot classifiers, and small probes on frozen activations (SPEC 4.7).

Library functions with plain arguments. Each gives a :class:`~revelio.probes.score.Score`: accuracy with its
interval, and seconds an image on this machine.
"""
