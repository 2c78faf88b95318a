"""The LLaVA extension proved on two processor cores: train the four rows small, ask held-out questions.

Needs Caltech-101 (`images/`, `train.txt`, `test.txt`), the shipped mini models and `revelio models prepare`.
Everything lands in --out; a second call goes on where the first one stopped. `--search` tries learning rates
on a part of the training photographs instead (`--search --quick --rows clip` is the smallest one).
"""

from pathlib import Path

from revelio.command_line import one_line_errors


def main() -> None:
    """Train, score, report; a user's mistake ends with one line and status 2."""
    import tyro

    from tools.llava_proof.proof import Places, Settings, prove

    settings = tyro.cli(Settings, description=__doc__)
    page, figures = settings.docs / "llava_mini.md", settings.docs / "llava_mini.json"
    with one_line_errors("llava_mini", "stopped; what is finished is kept, the same call goes on"):
        places = Places(settings.sized(), Path(__file__).resolve().parents[1])
        from revelio.run_dir import read_json, write_json, write_whole
        from tools.llava_proof.page import render

        kept = settings.docs / "llava_rates.json"
        if settings.search:
            from tools.llava_proof.search import search

            found = search(places)
            earlier = read_json(kept) if kept.is_file() else {}
            write_json(kept, earlier | {found["command"]: found})
            print(f"wrote {kept}")
            if not figures.is_file():
                return
            measured = read_json(figures)
        else:
            from tools.llava_proof.report import measure

            prove(places)
            measured = measure(places)
            write_json(figures, measured)
        rates = {"rates": read_json(kept)} if kept.is_file() else {}
        write_whole(page, render(measured | rates))
        print(f"wrote {figures} and {page}" if not settings.search else f"wrote {page}")


if __name__ == "__main__":
    main()
