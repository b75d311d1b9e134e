"""A request's jobs, from the queue to their end."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Sequence

from starlette.requests import Request

from mhesa.serve.api.errors import APIError, disconnected, stopping
from mhesa.serve.api.service import Service
from mhesa.serve.engine.jobs import Job, Stopped
from mhesa.serve.logs import log


class Submission:
    """Queues a request's jobs, and waits for them.

    `close` must be called in any case: it cancels what is not finished.

    Raises:
        APIError: the queue is full, or the server is shutting down.
    """

    def __init__(self, service: Service, request: Request, jobs: Sequence[Job]) -> None:
        self.service, self.request, self.jobs = service, request, jobs
        self._event = asyncio.Event()
        # What ends the request before its jobs are done.
        self._end: Exception | None = None
        for job in jobs:
            job.wake = self._event.set
        service.submit(jobs)
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._watch_client())
        late = APIError(504, "this took too long; ask for less", code="timeout")
        self._timer = loop.call_later(service.settings.limits.request_seconds, self._end_with, late)

    async def progress(self) -> None:
        """Wait until a job has progress to report.

        Raises:
            APIError: a job failed, the request took too long, or the client closed the connection.
        """
        await self._event.wait()
        self._event.clear()
        self.check()

    async def finish(self) -> None:
        """Wait until all jobs are done; raises as `progress` does."""
        while not all(job.done for job in self.jobs):
            await self.progress()
        self.check()

    def close(self) -> None:
        """Cancel the jobs that are not done, and record the times."""
        self._watch.cancel()
        self._timer.cancel()
        # What was written and nobody read goes, too.
        self.service.has_grown |= self._end is not None
        now = time.perf_counter()
        for job in self.jobs:
            if not job.done:
                self.service.engine.cancel(job)
            if job.first_token is None:
                continue
            self.service.metrics.first_token.observe(job.first_token - job.created)
            longest = max(text.count for text in job.texts)
            if longest > 1:
                self.service.metrics.per_token.observe((now - job.first_token) / (longest - 1))

    def check(self) -> None:
        """Raise as `progress` does, without waiting."""
        if self._end is not None:
            raise self._end
        for job in self.jobs:
            if isinstance(job.error, Stopped):
                raise stopping(str(job.error))
            if job.error is not None:
                log("fault", error="".join(traceback.format_exception(job.error)))
                raise APIError(500, "the model failed on this request", code="model_failure") from job.error

    async def _watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._end_with(disconnected())

    def _end_with(self, error: Exception) -> None:
        self._end = error
        self._event.set()
