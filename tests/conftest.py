import os

# Before torch is imported: workers share the cores, and threads of theirs wait for each other, so
# that two workers that train at once took minutes for seconds.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["hf_watermark.testing.pytest_plugin"]
