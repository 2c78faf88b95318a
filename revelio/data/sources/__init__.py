"""Where pictures come from: folders, archives of known data sets, idx files, Hugging Face data sets."""
