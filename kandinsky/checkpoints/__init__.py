"""Weight files: where they are, what their headers say, how they are fetched; no tensors, and no torch."""
