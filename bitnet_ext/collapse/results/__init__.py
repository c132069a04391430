"""What a study wrote, as data, and how its runs ended."""
