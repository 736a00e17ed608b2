"""What a person reads: tables, progress, words."""
