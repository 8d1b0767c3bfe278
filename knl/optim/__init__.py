"""LARS in its four forms, plain SGD, and the learning-rate schedules."""
