"""The model in plain NumPy, float64: what the runtime is measured against. Shares no code with it."""
