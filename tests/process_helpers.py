"""Processes as a launcher starts them, without the wait: forked from one that has imported the libraries.

The imports of a real start take ten seconds a process. What is imported is all that the processes share.
The launchers themselves are run in test_llava_deepspeed.py.
"""

import os
import runpy
import sys
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

from llava_ext.deepspeed import free_port

REVELIO = Path(__file__).parents[1] / "revelio" / "__main__.py"
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "diffusers",
        "deepspeed",
        "peft",
        "llava_ext.run",
        "revelio.pipelines",
    ]
)


def in_processes(
    count: int, script: Path, *words: Any, timeout: int = 300
) -> CompletedProcess[str]:
    """Run a script in ``count`` processes that find each other as under `torchrun`; one: without a group.

    Args:
        count: how many.
        script: what each of them runs as `__main__`.
        words: its arguments.
        timeout: seconds until all are killed.

    Returns:
        The first status that is not 0, and what all printed, process by process.
    """
    shared = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    argv = [str(script), *map(str, words)]
    with TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            files = [Path(folder) / f"{name}{rank}" for name in ("out", "err")]
            for file in files:
                file.touch()
            process = CONTEXT.Process(target=_become, args=(argv, shared | own, *files))
            process.start()
            started.append(process)
        status = _wait(started, timeout)
        output, errors = (
            "".join((Path(folder) / f"{name}{rank}").read_text() for rank in range(count))
            for name in ("out", "err")
        )
    return CompletedProcess(argv, status, output, errors)


def _become(argv: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def _wait(started: list[BaseProcess], timeout: int) -> int:
    """Until all have ended; one that fails, or takes too long, ends the others."""
    running = {process.sentinel: process for process in started}
    while running:
        ended = connection.wait(list(running), timeout)
        failed = [running.pop(each) for each in ended]  # type: ignore[call-overload]
        failed = [process for process in failed if process.exitcode]
        if failed or not ended:
            for process in running.values():
                process.kill()
            return next((process.exitcode for process in failed if process.exitcode), -1)
    return 0
