"""Measurements of speed: as ratios inside one run, and only of what computes the right thing."""
