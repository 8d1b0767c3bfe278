"""`knl bench`: each part measured beside its peers, in turn, in one run."""
