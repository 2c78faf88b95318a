"""What `python -m tools.cells_proof` measures: k-SAEs of pooled activations against k-SAEs of cells."""
