"""What this repository is made with, and no part of the wheel: run it from the repository's root.

    python -m tools.train_mini      train a shipped model (tools/mini, tools/configs)
    python -m tools.evaluate_mini   measure the shipped models: docs/mini_models.json, docs/mini_models.md
    python -m tools.export_mini     put finished models into models/, each with its card
    python -m tools.make_samples    write the shipped sample of Fashion-MNIST
    python -m tools.llava_mini      the LLaVA extension trained small and scored (tools/llava_proof)
    python -m tools.cells_proof     k-SAEs of cells against pooled ones: docs/cells.md (tools/cells)
    python -m tools.reliability     the campaign of hostile inputs, kills and full disks: docs/reliability.md
    python -m tools.gpu_check       everything claimed for CUDA, on this machine's GPU
    python -m tools.scaling         docs/scaling.md, from measured rates
    python -m tools.render_docs     README's measured part, from the JSON under docs/ (tools/tables.py)

Nothing of the library imports it.
"""
