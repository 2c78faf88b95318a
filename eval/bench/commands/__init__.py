"""The subcommands of `revelio llava-bench`: each a ``Config`` and ``run(config)``."""
