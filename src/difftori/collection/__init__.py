"""Collecting demonstrations from scripted experts: play, keep what succeeded, write a data set."""
