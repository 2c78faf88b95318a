"""Activation stores: the file format (FORMAT.md), reading, writing, and resumable extraction."""
