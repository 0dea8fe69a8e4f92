"""Local search from one point."""
