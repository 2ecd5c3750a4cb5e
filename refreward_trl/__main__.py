"""`python -m refreward_trl` is the same program as `refreward`."""

from __future__ import annotations

import os
import sys
import threading
import traceback

from refreward_trl.cli import app


def main() -> int:
    """Runs a command, and after an error waits for nothing that it has left behind."""
    try:
        code = app.main()
    except Exception:
        if not _would_wait():
            raise
        traceback.print_exc()
        code = 1
    if code and _would_wait():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _leave_process_group()
    return code


def _leave_process_group() -> None:
    """Ends what a launcher's processes talk through, which torch warns about on GPUs if it is left to the exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _would_wait() -> bool:
    """Whether somebody would wait for this process to end in order: the other ranks, or the interpreter for the
    threads of a reward that hangs."""
    threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or not all(thread.daemon for thread in threads)


if __name__ == "__main__":
    sys.exit(main())
