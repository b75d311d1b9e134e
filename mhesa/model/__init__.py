"""The model in plain torch: its layers, its sizes, and loading a saved one.

This module imports nothing, so that `mhesa.model.loading` can refuse a wrong folder without importing torch.
"""
