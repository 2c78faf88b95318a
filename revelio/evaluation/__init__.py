"""Does a k-SAE beat its controls? Every measure of it beside theirs, on held-out images."""
