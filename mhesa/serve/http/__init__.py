"""Sockets, signals, access control, logs and metrics."""
