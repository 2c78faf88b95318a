"""What this repository is made and checked with, and no part of the wheel; run it from the root."""
