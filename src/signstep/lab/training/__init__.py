"""One training run: its configuration, model, batches, loop, workers, checkpoint and record."""
