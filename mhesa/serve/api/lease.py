"""The right to continue a stored session."""

from __future__ import annotations

from mhesa.serve.api.errors import APIError
from mhesa.serve.api.service import Service
from mhesa.serve.engine.jobs import Job
from mhesa.serve.sessions import StoredSession


class SessionLease:
    """Keeps a session for one request, until it is released.

    Args:
        service: whose sessions.
        client, name: which.

    Raises:
        APIError: another request has it.
    """

    def __init__(self, service: Service, client: str, name: str) -> None:
        self.service, self.client, self.name = service, client, name
        self.stored: StoredSession | None = None
        if (client, name) in service.sessions_in_use:
            message = f"session {name} is being continued by another request"
            raise APIError(409, message, param="session", code="session_in_use")
        service.sessions_in_use.add((client, name))

    async def load(self) -> None:
        """Read the session, if there is one, into `stored`."""
        load = self.service.sessions.load
        self.stored = await self.service.run_in_disk_thread(load, self.client, self.name)

    async def save(self, job: Job) -> None:
        """Store the session as it is behind a job."""
        (text,) = job.texts
        token = int(job.ids[-1]) if text.last is None else text.last
        before = self.stored.position if self.stored else 0
        # The job's first token was the session's last.
        position = before + len(job.ids) - 1 + text.drawn
        stored = StoredSession(self.service.engine.state(job), token, position)
        await self.service.run_in_disk_thread(self.service.sessions.save, self.client, self.name, stored)

    def release(self) -> None:
        """Let other requests have it."""
        self.service.sessions_in_use.discard((self.client, self.name))
