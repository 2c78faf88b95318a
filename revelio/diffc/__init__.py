"""Diff-C, the light classifier on grids (paper Sec. 3.3, Table 1), and its training."""
