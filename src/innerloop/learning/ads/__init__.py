"""Ads: what a click is worth (purchase given click), which of a list is clicked, and how sure of it one can be."""
