"""What every other part of aiotun uses: the driver's constants and ioctls, threads, namespaces."""
