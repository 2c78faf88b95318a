"""The mini models: small, real, trained here with the recipes of the big ones.

mini-clip (image and text encoder), mini-vae, mini-sd (text-conditional latent diffusion),
mini-sd-photo and mini-dit. Every one is saved in the folder layout of its big sibling, so that it
loads by the very code path of SD-1.5, CLIP or DiT.
"""
