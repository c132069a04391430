"""Which kind of trouble one run shows, and what to change."""
