"""A model behind OpenAI's API, and a page to look at it with."""
