"""Subcommands, one file each: ``Config`` (the flags) and ``run(config)``. Only here do configs exist."""
