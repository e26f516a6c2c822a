"""Measured choices and launch configurations, a JSON file a GPU."""
