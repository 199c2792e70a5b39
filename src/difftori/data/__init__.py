"""Demonstrations and replay: storage and sampling, ignorant of policies and planning."""
