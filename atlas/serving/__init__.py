"""An OpenAI-compatible server for models, with pages that show how a model works and how a run trains."""
