"""HTTP: translates requests into use cases and results into JSON. Knows aiohttp; nothing below it does."""
