"""Settings of every test run: one thread, no network, caches of its own, and shapes checked at run time."""

from __future__ import annotations

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="refreward-tests-")

# Before torch or a Hugging Face library is imported: they read these once.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": _CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("refreward_trl", "typecheck.check_types")
