"""A polite crawler: addresses, robots.txt, fetching, pages, the frontier on disk, the loop."""
