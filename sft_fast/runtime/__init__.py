"""What keeps a run alive: watchdog, hangs, locks, manifests, launcher."""
