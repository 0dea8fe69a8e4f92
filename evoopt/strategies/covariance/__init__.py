"""Search distributions that learn how coordinates vary together."""
