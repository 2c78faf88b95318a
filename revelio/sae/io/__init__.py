"""k-SAEs read and written: our own files, and the forms of others."""
