"""The version, declared once: the build reads this file, and a leaf can import it without the façade."""

__version__ = "0.1.0"
