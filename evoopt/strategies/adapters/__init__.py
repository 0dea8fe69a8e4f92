"""Strategies of other libraries behind this protocol."""
