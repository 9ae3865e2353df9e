"""Bridges to other libraries. Nothing is imported until one of its modules is."""
