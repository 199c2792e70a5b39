"""Demonstrations and replay: storage and sampling. Independent of policies and planning."""
