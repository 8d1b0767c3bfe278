"""Reports: one self-contained page for a run or a study, its plots and its tables."""
