"""Corpora: reading text, holding some of it out, tokenising it once, cutting it into windows."""
