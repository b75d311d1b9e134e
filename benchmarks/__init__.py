"""Speed and quality measured against other implementations: `python -m benchmarks --help`."""
