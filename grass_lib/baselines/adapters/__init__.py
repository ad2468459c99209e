"""One adapter per system; each imports its library only where it runs, in the worker's process."""
