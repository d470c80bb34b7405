"""The formats of OpenAI's API: the fields of requests, the shapes of responses, and errors."""
