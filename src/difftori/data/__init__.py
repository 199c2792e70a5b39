"""Demonstrations and, later, replay: storage and sampling, ignorant of policies and planning."""
