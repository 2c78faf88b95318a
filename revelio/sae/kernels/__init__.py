"""The heavy parts of a k-SAE: one interface (`base`), in PyTorch, C++ and Triton."""
