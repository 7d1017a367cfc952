"""The engine and the worker shell around it."""
