"""Which layer, timestep, prompt and model serve somebody's own pictures best: measured, not guessed."""
