"""The optimisation core: torch and numpy, no database, no queue, no web."""
