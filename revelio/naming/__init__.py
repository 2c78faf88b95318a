"""What latents stand for, in words: asked of a vision-language judge, and checked on other images."""
