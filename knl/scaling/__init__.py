"""Scaling studies: what more nodes bring, measured and predicted."""
