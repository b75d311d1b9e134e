"""The right to continue a stored session."""

from __future__ import annotations

from mhesa.inference.session import SessionState
from mhesa.serve.api.errors import APIError
from mhesa.serve.api.service import Service
from mhesa.serve.engine.jobs import Job


class SessionLease:
    """Reserves a client's session for one request, until it is released or the context ends.

    Raises:
        APIError: another request has it.
    """

    def __init__(self, service: Service, client: str, name: str) -> None:
        self.service, self.client, self.name = service, client, name
        self.stored: SessionState | None = None
        if (client, name) in service.sessions_in_use:
            message = f"session {name} is being continued by another request"
            raise APIError(409, message, param="session", code="session_in_use")
        service.sessions_in_use.add((client, name))

    def __enter__(self) -> SessionLease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    async def load(self) -> None:
        """Read the session, if there is one, into `stored`."""
        load = self.service.sessions.load
        self.stored = await self.service.run_in_disk_thread(load, self.client, self.name)

    async def save(self, job: Job) -> None:
        """Store the session as it is after a job."""
        (text,) = job.texts
        token = int(job.ids[-1]) if text.last is None else text.last
        before = self.stored.position if self.stored else 0
        # The job's first token was the session's last.
        position = before + len(job.ids) - 1 + text.count
        stored = SessionState(self.service.engine.state(job), token, position)
        await self.service.run_in_disk_thread(self.service.sessions.save, self.client, self.name, stored)

    def release(self) -> None:
        """Let other requests use the session."""
        self.service.sessions_in_use.discard((self.client, self.name))
