"""What numba prepares before the first kernel is loaded, in the server that processes are forked from.

It takes each process a third of a second otherwise. No thread is started, and no kernel is called.
"""

from numba.core.registry import cpu_target

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
