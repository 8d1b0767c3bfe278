"""`knl data pack`: source pictures to a packed set (`knl.data.packed_set`)."""
