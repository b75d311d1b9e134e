"""The decode loop and what waits for it."""
