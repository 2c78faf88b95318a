"""The subcommands of `revelio llava`: each a ``Config`` and ``run(config)``."""
