"""What the training scripts share: data, rewards, the run's folder, callbacks, perplexity and mining."""
