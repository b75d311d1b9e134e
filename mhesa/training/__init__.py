"""Training a model on text; `mhesa.training.loop` is the loop itself."""
