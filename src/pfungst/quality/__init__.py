"""How good maps are: one file a measure, each with its source and its cost; ``measures.py`` has them by name."""
