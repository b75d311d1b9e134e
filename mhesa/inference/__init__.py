"""What a trained model is used for: decoding, sampling, generation, sessions, scores."""
