"""Is a k-SAE better than what learned nothing? Every measure of it, beside controls, on held-out images."""
