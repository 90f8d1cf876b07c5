"""Many merges of the same models: the space of candidates, its plan, its running."""
