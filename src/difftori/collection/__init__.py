"""Collects demonstrations of scripted experts: runs episodes, selects the successful ones, writes a data set."""
