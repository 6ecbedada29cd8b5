"""Doing it: stream, encode, write, resume, verify."""
