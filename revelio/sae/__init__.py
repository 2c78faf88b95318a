"""k-sparse autoencoders: model, training, metrics, import and export. Knows only torch."""
