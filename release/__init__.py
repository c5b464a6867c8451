"""Building, checking and trying wheels; docs/wheels.md says how. Needs requirements-release.txt, and no torch."""
