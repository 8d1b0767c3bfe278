"""The measured search: what can be varied, one trial, the search over trials, its result."""
