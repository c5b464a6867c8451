"""The model, and how it samples: caches, routes, drafts."""
