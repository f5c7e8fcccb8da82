"""Measures of how good relevance maps are."""
