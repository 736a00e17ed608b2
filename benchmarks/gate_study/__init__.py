"""How often `bsprof ab` cries wolf, and how small a slow-down it finds."""
