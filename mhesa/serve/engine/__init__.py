"""Continuous batching: jobs, the queues in which they wait, and the thread that works on them."""
