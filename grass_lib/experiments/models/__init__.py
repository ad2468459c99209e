"""Model architectures that experiments share."""
