"""The job itself: the training loop, evaluation, metrics."""
