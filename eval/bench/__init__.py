"""LLaVA-Bench (in the wild): its files, the judge, the scores."""
