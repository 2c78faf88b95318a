"""The extension's proof on two processor cores: small towers, a small language model, real photographs."""
