"""The subcommands of `eval/llava_bench.py`: each a ``Config`` and ``run(config)``."""
