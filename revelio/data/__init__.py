"""Images in: folders, Hugging Face datasets, the sets of the paper by name, transforms."""
