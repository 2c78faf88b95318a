"""A folder of another kind than a command reads, or a port that is taken: a line that says what to give."""

import socket
from pathlib import Path

import pytest
from command_helpers import fails
from sae_helpers import random_model

from revelio.analysis.top_images_files import load_top_images
from revelio.diffc.model import load_diffc
from revelio.pipelines.serve import ServeConfig, _listening
from revelio.steering.concept import Concept


def test_a_folder_of_another_kind_is_told_which_command_writes_what_is_read(tmp_path: Path, capsys):
    """As a k-SAE's run where a concept, a Diff-C, top images or a gallery is asked for."""
    random_model(d=4, n=8, k=2).save_pretrained(tmp_path / "run" / "final")
    run = tmp_path / "run"
    for load, said in (
        (Concept.load, "holds no concept .* that `revelio concept` wrote"),
        (load_top_images, "holds no top images .* that `revelio top-images` wrote"),
        (load_diffc, "no Diff-C in .*final .* that train-diffc names"),
    ):
        with pytest.raises(ValueError, match=said):
            load(run)
    assert (
        "holds no gallery (it has no gallery.json): give a folder that `revelio gallery` wrote"
        in fails(capsys, "serve", run)
    )
    # What stands without a flag is named as on the help page.
    line = fails(capsys, "serve", tmp_path / "nowhere")
    assert "GALLERY is " in line and "--gallery" not in line


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(gallery=tmp_path, port=port)
        with pytest.raises(
            ValueError, match=rf"port {port} .*in use.*: give another port, such as 0"
        ):
            _listening(config)
