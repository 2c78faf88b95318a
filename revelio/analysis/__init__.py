"""What a k-SAE has found: top images, purity, PCA maps, gallery."""
