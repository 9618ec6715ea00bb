"""Real processes under faults, and what must hold whatever breaks."""
