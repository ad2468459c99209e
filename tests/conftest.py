"""Makes this folder importable, so that all tests share ``zoo``."""
