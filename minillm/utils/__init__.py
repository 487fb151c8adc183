"""Floor 0: what every other part may lean on. Imports nothing of minillm; no torch in errors, files and logging."""
