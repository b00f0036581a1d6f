"""`based serve`: completions over HTTP, in the form of OpenAI's API. Needs the extra `server`.

Nothing else in the package imports this one, and `import based` does not need what it needs.
"""
