"""A model for programs without Python: ONNX graphs, and a page that runs it in a browser."""
