"""Sockets, signals and access control."""
