pytest_plugins = ["hf_watermark.testing.pytest_plugin"]
