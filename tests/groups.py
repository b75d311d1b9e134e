"""A group of processes that run functions together, forked from one that has imported the package."""

import datetime
import multiprocessing.connection
import pickle
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist
from commands import FORKED

SIZES = (2, 3, 4, 8)


@contextmanager
def process_group(folder):
    """Start eight processes: a function that has the first `size` of them run another together."""
    pipes, processes = [], []
    for rank in range(max(SIZES)):
        ours, theirs = FORKED.Pipe()
        process = FORKED.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def run(function, size, *arguments):
        """What `function(group, *arguments)` returns in each process."""
        for pipe in pipes[:size]:
            # Not `send`, which would share a tensor's memory instead of copying it.
            pipe.send_bytes(pickle.dumps((function, size, arguments)))
        answers = []
        while len(answers) < size:
            for pipe in multiprocessing.connection.wait(pipes[:size]):
                rank, answer, failure = pickle.loads(pipe.recv_bytes())
                assert not failure, failure
                answers.append((rank, answer))
        return [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]

    try:
        yield run
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(60)
            process.kill()


def _serve(rank, store, pipe):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Where one process fails, the others must not wait for it for half an hour.
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=max(SIZES), timeout=limit
    )
    groups = {size: dist.new_group(range(size), timeout=limit) for size in SIZES}
    while True:
        try:
            function, size, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            break
        answer, failure = None, ""
        try:
            answer = function(groups[size], *arguments)
        except Exception:
            failure = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((rank, answer, failure)))
    dist.destroy_process_group()
