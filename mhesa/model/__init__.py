"""The model in plain torch: its layers, its sizes, and loading a saved one.

Nothing is imported here: `mhesa.model.loading` answers a wrong folder without importing torch.
"""
