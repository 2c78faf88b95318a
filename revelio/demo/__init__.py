"""The demo: the main job in one go, on the shipped model and real images, and its report."""
