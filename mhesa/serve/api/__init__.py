"""OpenAI's API: requests, responses, routes."""
