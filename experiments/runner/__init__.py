"""What runs a command: options, timed stages, the cache, provenance."""
