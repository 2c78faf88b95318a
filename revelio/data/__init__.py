"""Images in: folders, Hugging Face datasets, recipes for the sets of the paper, transforms."""
