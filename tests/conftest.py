"""Settings for the whole suite: four fake CPU devices and one shared compilation cache.

They must be in the environment before jax is imported anywhere, hence the code above the imports.
"""

import gc
import os
import pathlib
import tempfile

# A twelfth of the suite's time went into looking through millions of objects that stay.
gc.set_threshold(20_000, 20, 20)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("GLIBC_TUNABLES", "")  # launch.py must not re-execute the test runner
CACHE = pathlib.Path(tempfile.gettempdir()) / f"mobilevit_jax_test_cache_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["MPLBACKEND"] = "Agg"
