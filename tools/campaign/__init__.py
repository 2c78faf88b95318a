"""Parts of the reliability campaign."""
