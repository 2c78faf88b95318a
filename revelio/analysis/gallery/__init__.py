"""The gallery of latents: one static folder of pages."""
