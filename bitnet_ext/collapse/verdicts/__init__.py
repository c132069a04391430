"""What a study shows, computed from its results by stated rules."""
