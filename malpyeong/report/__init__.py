"""Pages to read: what a prediction got wrong, and how a training run went."""
