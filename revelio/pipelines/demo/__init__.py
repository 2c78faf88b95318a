"""The whole of Revelio on one model and one set of pictures, with a report."""
