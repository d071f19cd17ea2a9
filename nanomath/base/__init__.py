"""What every part stands on: settings, files, what a run prints. Imports no torch."""
