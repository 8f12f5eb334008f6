"""What every other room stands on: the driver's constants and ioctls, threads, namespaces."""
