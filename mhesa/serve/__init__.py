"""The HTTP server: OpenAI's API, continuous batching, stateful sessions, a page to try it on."""
